"""What the NCCL communicator promises about joining; libnccl is played by a double."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from typing import Any, cast

import pytest
import torch

from tpcomm import CommTimeout, NcclError
from tpcomm.nccl import NcclCommunicator
from tpcomm.nccl_api import Nccl


class FakeNccl:
    """Joining waits for `release` or raises `error`."""

    def __init__(self, error: NcclError | None = None) -> None:
        self.release = threading.Event()
        self.error = error

    def function(self, name: str) -> Any:
        return lambda *args: 0

    def init_rank(self, unique_id: bytes, rank: int, world_size: int) -> ctypes.c_void_p:
        if self.error is not None:
            raise self.error
        assert self.release.wait(20)
        return ctypes.c_void_p(1)


def _join(nccl: FakeNccl, timeout_s: float) -> NcclCommunicator:
    return NcclCommunicator(cast(Nccl, nccl), b"\0" * 128, 1, 2, torch.device("cpu"), timeout_s)


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def enter(device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device", enter)


def test_joining_gives_up_at_the_limit_though_nccl_hangs() -> None:
    nccl = FakeNccl()
    with pytest.raises(CommTimeout, match="the 2 ranks did not all join NCCL within 0.05 s"):
        _join(nccl, 0.05)
    nccl.release.set()
    for thread in threading.enumerate():
        if thread.name == "ncclCommInitRank":
            thread.join(20)
            assert not thread.is_alive()


def test_joining_passes_on_the_error_of_nccl() -> None:
    with pytest.raises(NcclError, match="ncclCommInitRankConfig returned 2: system") as caught:
        _join(FakeNccl(NcclError(2, "system", "ncclCommInitRankConfig")), 20.0)
    assert caught.value.code == 2
