"""What kernels over staging memory read, and the protocol that they share.

**Data is its own flag.** A rank pushes what it sends straight into its row of every peer's
memory. A word of memory that nothing has been sent to is all ones; a receiver polls its own
memory until no word is. So a message takes one way over the link, no fence and no counter. The
idea is Lamport's; TensorRT-LLM's one-shot all-reduce is built on it.

What is sent never is all ones: floats go as they are, but for the NaN of all ones, which becomes
another NaN (a sum of either is the one canonical NaN); integers and raw bytes go in words of twice
their width, high half zero. A word is at most 8 bytes, so it arrives whole.

**Three buffers** alternate. Call n writes its peers' buffer n % 3, and wipes its own (n - 1) % 3
back to ones. That is enough: a rank in call n has ended call n - 1, hence received something that
each peer sent in its call n - 1, hence each peer had ended its call n - 2, in which it wiped the
buffer (n - 3) % 3 = n % 3. This needs each call to receive from every peer, and kernels of one
rank that do not overlap: those of one stream, which begin with `after_previous`.

**State** is one int64 per program: in its high half the sequence, the number n of the next call
(it wraps at a multiple of 3), and in its low half how much of the buffer before is to be wiped.
Program p of P reads entry p, and all programs together write all entries; entries from P on are
read by nobody meanwhile. Nothing on the host changes from call to call, so a replayed graph goes
on by itself, and calls of any kind and size may follow each other. Each call leaves an entry under
its sequence in `ring` (record_kernels).

**Not too many at once.** All programs of a call poll. On two H100, 2,048 programs of 4 warps,
which all fit the device, now and then never saw their data arrive; 1,024 always did. (A warp that
was late could then read the state of the next call, which is mended and may have been the cause.)
So a call has at most half of the warps that a multiprocessor holds, and larger messages go another
way.

Layout of a rank's staging memory: 3 buffers of `world_size` rows of `slot_bytes`; row r holds
what rank r sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpcomm.records import ENTRY_WORDS, RING_ENTRIES, pack

NUM_BUFFERS = 3
CHUNK_BYTES = 2048  # of a row, which one program of an all-reduce sends to each peer
NUM_WARPS = 4  # per chunk: each thread moves one vector
VECTOR_BYTES = 16
WARPS_PER_MULTIPROCESSOR = 32  # that may poll; it holds 64


@dataclass(frozen=True)
class StagingTables:
    """Fixed device addresses whose contents may change between replays.

    bases: int64 [world_size], where this process has mapped each rank's staging memory.
    state: int64 [num_states], all alike between calls; as many programs may run in a call.
        No more than are needed, as each call writes them all.
    max_warps: as many warps may run in a call, on all of the device together.
    abort_word: int32 [1], not zero to make every wait give up.
    ring: int64 [RING_ENTRIES + 1, ENTRY_WORDS], the last calls, zeros where there was none, and
        the totals.
    is_recording: whether calls are recorded; off to measure what that costs.
    """

    bases: Tensor
    state: Tensor
    abort_word: Tensor
    ring: Tensor
    rank: int
    slot_bytes: int
    max_warps: int
    is_recording: bool = True

    @property
    def addresses(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What every kernel is given, in this order."""
        return self.bases, self.state, self.abort_word, self.ring

    def code(self, operation: str, path: str) -> int:
        """What a kernel records, but for the bytes; 0 for nothing."""
        return pack(operation, path, 0) if self.is_recording else 0

    def fits(self, num_programs: int, num_warps: int) -> bool:
        """Whether a call of so many programs, of so many warps each, may run."""
        return num_programs <= self.state.numel() and num_programs * num_warps <= self.max_warps

    @property
    def world_size(self) -> int:
        return self.bases.numel()


def staging_size(world_size: int, slot_bytes: int) -> int:
    """Bytes of one rank's staging memory. They are all ones before the first call."""
    return NUM_BUFFERS * world_size * slot_bytes


def make_tables(
    world_size: int,
    rank: int,
    slot_bytes: int,
    device: torch.device,
    max_warps: int = 1 << 30,
) -> StagingTables:
    """Tables whose `bases` are still to be filled in; `slot_bytes` is whole chunks."""
    assert slot_bytes > 0 and slot_bytes % CHUNK_BYTES == 0, slot_bytes
    return StagingTables(
        bases=torch.zeros(world_size, dtype=torch.int64, device=device),
        state=torch.zeros(
            min(slot_bytes // CHUNK_BYTES, max_warps // NUM_WARPS), dtype=torch.int64, device=device
        ),
        abort_word=torch.zeros(1, dtype=torch.int32, device=device),
        ring=make_ring(device),
        rank=rank,
        slot_bytes=slot_bytes,
        max_warps=max_warps,
    )


def make_ring(device: torch.device) -> Tensor:
    """A ring without entries, and totals of 0."""
    return torch.zeros((RING_ENTRIES + 1, ENTRY_WORDS), dtype=torch.int64, device=device)


def vector_width(*tensors: Tensor) -> int:
    """Elements that may move at once: of 16 bytes, or 1 where an address or a size is ragged."""
    ragged = any(t.data_ptr() % VECTOR_BYTES or t.nbytes % VECTOR_BYTES for t in tensors)
    return 1 if ragged else VECTOR_BYTES // tensors[0].dtype.itemsize
