"""Sizes, views and refusals of the shared segment."""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tpcomm import CommError
from tpcomm.group_id import new_name
from tpcomm.shm_segment import ShmSegment, sequence_word, slot_size


@pytest.mark.parametrize("world_size", [2, 3, 8, 64])
def test_segment_stays_within_8_mib(world_size: int) -> None:
    size = slot_size(world_size, 1 << 30)
    assert size % 4096 == 0
    assert 0 < 2 * world_size * size <= 8 << 20


def test_staging_bytes_too_small_for_two_pages_is_refused() -> None:
    with pytest.raises(CommError, match="at least 8192"):
        slot_size(2, 8191)
    assert slot_size(2, 8192) == 4096


def _open_pair(staging: tuple[int, int]) -> list[ShmSegment]:
    name = new_name()
    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(ShmSegment, name, r, 2, 10.0, staging[r]) for r in range(2)]
        return [future.result(20) for future in futures]


def test_ranks_see_one_memory_and_slots_do_not_overlap() -> None:
    first, second = _open_pair((1 << 16, 1 << 16))
    shape = torch.Size([first.slot_bytes // 4])
    for parity in (0, 1):
        for rank, slot in enumerate(first.slots(shape, torch.float32, parity)):
            slot.fill_(10 * rank + parity)
    for parity in (0, 1):
        for rank, slot in enumerate(second.slots(shape, torch.float32, parity)):
            assert torch.equal(slot, torch.full(shape, 10.0 * rank + parity))
    first.words[sequence_word(1)] = 2**40
    assert second.words[sequence_word(1)] == 2**40
    first.close()
    second.close()


def test_sizes_that_differ_between_ranks_are_refused() -> None:
    with pytest.raises(CommError, match="differ between ranks"):
        _open_pair((1 << 16, 1 << 15))


def test_other_machines_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(CommError, match="this is aarch64; choose gloo"):
        ShmSegment(new_name(), 0, 2, 0.1, 1 << 16)


def test_no_room_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CommError, match=r"no room .* \(No space left on device\)"):
        ShmSegment(new_name(), 0, 2, 0.1, 1 << 16)
