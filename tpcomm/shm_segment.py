"""One shared memory segment: a line of counters per rank, then two data slots per rank.

The segment is a sealed memfd handed over a socket (fd_exchange): it has no name in the file
system, so it is gone with its last process however that ends, and the size of /dev/shm does not
bound it.

    line 0            abort word
    line 1 + r        rank r: sequence number, signature of odd and even calls
    then              slot [rank][parity], each slot_bytes
Lines are 64 bytes apart, so that no two ranks write to one cache line.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform

import torch
from torch import Tensor

from tpcomm.errors import CommError
from tpcomm.fd_exchange import exchange_fds

LINE_WORDS = 8
ABORT_WORD = 0
_LINE_BYTES = 8 * LINE_WORDS
_PAGE = 4096
_MAX_SEGMENT_BYTES = 8 << 20
_MAX_SLOT_BYTES = 1 << 20
_MAX_CACHED_VIEWS = 1024


def sequence_word(rank: int) -> int:
    """Index of the word in which `rank` publishes the number of its last call."""
    return LINE_WORDS * (1 + rank)


def signature_word(rank: int, parity: int) -> int:
    """Index of the word that says what `rank` is doing in its last call of this parity."""
    return sequence_word(rank) + 1 + parity


class ShmSegment:
    """`words` are the counters as 64-bit integers; `slots` hands out typed views of the data.

    Publishing relies on the stores of one core becoming visible in program order, which x86
    promises (Intel SDM volume 3, 9.2.3.2) and Python cannot ask for elsewhere.
    """

    def __init__(
        self, name: str, rank: int, world_size: int, timeout_s: float, staging_bytes: int
    ) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise CommError(
                f"the shm backend needs x86 memory ordering and this is {platform.machine()}; "
                "choose gloo"
            )
        self.world_size = world_size
        self.slot_bytes = slot_size(world_size, staging_bytes)
        self._header_bytes = _round_up(_LINE_BYTES * (1 + world_size), _PAGE)
        size = self._header_bytes + 2 * world_size * self.slot_bytes
        segment = _shared_map(name, rank, world_size, size, timeout_s)
        self.words = memoryview(segment)[: self._header_bytes].cast("Q")
        self._raw = torch.frombuffer(segment, dtype=torch.uint8)
        self._views: dict[tuple[torch.Size, torch.dtype, int], list[Tensor]] = {}

    def slots(self, shape: torch.Size, dtype: torch.dtype, parity: int) -> list[Tensor]:
        """Views `[world_size]` of every rank's slot as `shape` of `dtype`; they are cached."""
        key = (shape, dtype, parity)
        found = self._views.get(key)
        if found is not None:
            return found
        if len(self._views) >= _MAX_CACHED_VIEWS:
            self._views.clear()
        # Normal tensors whatever mode the caller is in: an inference tensor made now could not be
        # written outside inference mode later.
        with torch.inference_mode(False):
            views = [self._view(r, shape, dtype, parity) for r in range(self.world_size)]
        self._views[key] = views
        return views

    def close(self) -> None:
        """Let go of the mapping; it is unmapped with the last view of it."""
        self._views.clear()
        self._raw = torch.empty(0, dtype=torch.uint8)
        self.words.release()

    def _view(self, rank: int, shape: torch.Size, dtype: torch.dtype, parity: int) -> Tensor:
        begin = self._header_bytes + (2 * rank + parity) * self.slot_bytes
        num_bytes = shape.numel() * dtype.itemsize
        assert num_bytes <= self.slot_bytes
        return self._raw[begin : begin + num_bytes].view(dtype).view(shape)


def slot_size(world_size: int, staging_bytes: int) -> int:
    """Bytes of one slot: what the segment's bound leaves, at most `staging_bytes` a rank."""
    room = min(_MAX_SEGMENT_BYTES // world_size, staging_bytes) // 2
    size = min(room, _MAX_SLOT_BYTES) // _PAGE * _PAGE
    if size < _PAGE:
        raise CommError(f"staging_bytes {staging_bytes} leaves no slot: give at least {2 * _PAGE}")
    return size


def _shared_map(name: str, rank: int, world_size: int, size: int, timeout_s: float) -> mmap.mmap:
    own = _create(name, size) if rank == 0 else None
    try:
        table = exchange_fds(name, rank, world_size, own, timeout_s)
    finally:
        if own is not None:
            os.close(own)
    fd = table[0]
    try:
        found = os.fstat(fd).st_size
        if found != size:
            raise CommError(
                f"rank 0 made a segment of {found} bytes, rank {rank} expects {size}: "
                "world_size or staging_bytes differ between ranks"
            )
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)


def _create(name: str, size: int) -> int:
    fd = os.memfd_create(f"tpcomm-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, size)  # fail here, not by SIGBUS at the first touch
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as error:
        os.close(fd)
        raise CommError(
            f"no room for a shared memory segment of {size} bytes ({error.strerror}); raise the "
            "memory limit or lower staging_bytes"
        ) from error
    return fd


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
