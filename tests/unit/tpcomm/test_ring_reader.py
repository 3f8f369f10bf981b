"""Reading a device that does not answer; the device is played by a double."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from tests.unit.tpcomm.triton_programs import needs_triton
from tpcomm import CommTimeout
from tpcomm.records import pack
from tpcomm.ring_reader import RingReader
from tpcomm.staging_tables import make_ring

CPU = torch.device("cpu")
WHAT = pack("all_reduce", "one_shot", 64)


class HangingReader(RingReader):
    """Its copies wait until `answers` is set."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(CPU, limit_s)
        self.answers = threading.Event()
        self.num_copies = 0

    def _fetch(self, ring: Tensor, entries: list[list[int]]) -> None:
        self.num_copies += 1
        if self.answers.wait(10.0):
            entries.extend(ring.tolist())

    def _compare_clocks(self) -> int:
        return 0


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda *arguments, **options: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)


@needs_triton
@pytest.mark.usefixtures("without_cuda")
def test_device_that_hangs_is_given_up_and_not_asked_again_until_it_answers() -> None:
    reader, ring = HangingReader(0.05), make_ring(CPU)
    ring[3] = torch.tensor([3, WHAT, 500, 0])
    for _ in range(3):
        with pytest.raises(CommTimeout, match="could not be read from cpu within 0.05 s"):
            reader.read(ring)
    assert reader.num_copies == 1
    reader.answers.set()
    assert reader._thread is not None
    reader._thread.join(10)
    (record,) = reader.read(ring).calls
    assert (record.sequence, record.num_bytes, record.ended_ns) == (3, 64, 0)


@needs_triton
@pytest.mark.usefixtures("without_cuda")
def test_clock_of_the_device_never_runs_ahead_of_the_host() -> None:
    reader, ring = HangingReader(5.0), make_ring(CPU)
    reader.answers.set()
    ring[3] = torch.tensor([3, WHAT, 1 << 62, 0])
    first, second = reader.read(ring).calls, reader.read(ring).calls
    assert first[0].begun_ns == second[0].begun_ns < 1 << 62
