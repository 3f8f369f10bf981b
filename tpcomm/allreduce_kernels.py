# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""One-shot all-reduce over the peers' staging memory.

A message is cut into chunks of CHUNK_BYTES, one program each. A program copies its chunk to its
own rank's slot, raises its flag at every peer, waits for theirs, reads the chunk from every rank
and combines it in rank order: the same additions in the same order everywhere, so the same bits.

Chunk c of any message always lies at the same place, whatever the dtype, and has an epoch of its
own that lives on the device, so that a replayed graph counts on by itself. Its slots alternate
with the epoch. One wait a call is enough: a rank that writes its slot for epoch n has seen every
peer's flag n - 1, which a peer raises only after it has finished reading epoch n - 2.

A program waits only for the same program of its peers, so a message of more programs than run at
once still gets through where the device starts programs in order, as NVIDIA's do.

Layout of a rank's staging memory:
    flags   int64 [world_size, num_chunks]   row r is written by rank r
    slots   2 x slot_bytes, the first at `slots_offset`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpcomm.communicator import ReduceOp
from tpcomm.triton_language import jit, tl

CHUNK_BYTES = 8192
_VECTOR_BYTES = 16
_NUM_WARPS = 8


@dataclass(frozen=True)
class StagingTables:
    """What the kernel reads: fixed device addresses whose contents may change between replays.

    bases: int64 [world_size], where this process has mapped each rank's staging memory.
    epochs: int64 [num_chunks], calls that chunk c has seen.
    abort_word: int32 [1], not zero to make every wait give up.
    """

    bases: Tensor
    epochs: Tensor
    abort_word: Tensor
    rank: int
    slots_offset: int
    slot_bytes: int


@jit(varying=("tensor_ptr", "num_vectors", "rank"))
def _one_shot_all_reduce_kernel(
    tensor_ptr,
    bases_ptr,
    epochs_ptr,
    abort_ptr,
    num_vectors,
    rank,
    SLOTS_OFFSET: tl.constexpr,
    SLOT_BYTES: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
    IS_MAX: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    chunk = tl.program_id(0)
    dtype = tensor_ptr.dtype.element_ty
    offsets = tl.arange(0, CHUNK)
    index = chunk * CHUNK + offsets
    mask = index // VECTOR < num_vectors
    if VECTOR > 1:  # a hint on the argument itself is lost
        tensor_ptr = tl.multiple_of(tensor_ptr.to(tl.int64).to(tl.pointer_type(dtype)), 16)

    epoch = tl.load(epochs_ptr + chunk) + 1
    place = SLOTS_OFFSET + (epoch & 1) * SLOT_BYTES + chunk * CHUNK_BYTES
    own_base = tl.load(bases_ptr + rank)
    own_slot = tl.multiple_of((own_base + place).to(tl.pointer_type(dtype)), 16)
    tl.store(own_slot + offsets, tl.load(tensor_ptr + index, mask=mask), mask=mask)
    tl.debug_barrier()  # every thread has stored before one of them releases

    for peer in tl.static_range(WORLD_SIZE):
        base = tl.load(bases_ptr + peer)
        flag = (base + (rank * NUM_CHUNKS + chunk) * 8).to(tl.pointer_type(tl.int64))
        tl.atomic_xchg(flag, epoch, sem="release", scope="sys")

    # Read by atomics, not loads: one thread reads for all, so the threads cannot disagree.
    for peer in tl.static_range(WORLD_SIZE):
        flag = (own_base + (peer * NUM_CHUNKS + chunk) * 8).to(tl.pointer_type(tl.int64))
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        aborted = tl.atomic_add(abort_ptr, 0, sem="acquire", scope="sys")
        while (seen < epoch) & (aborted == 0):
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            aborted = tl.atomic_add(abort_ptr, 0, sem="acquire", scope="sys")
    tl.debug_barrier()

    first = tl.multiple_of((tl.load(bases_ptr) + place).to(tl.pointer_type(dtype)), 16)
    total = tl.load(first + offsets, mask=mask).to(ACCUMULATOR)
    for peer in tl.static_range(1, WORLD_SIZE):
        base = tl.load(bases_ptr + peer)
        slot = tl.multiple_of((base + place).to(tl.pointer_type(dtype)), 16)
        part = tl.load(slot + offsets, mask=mask).to(ACCUMULATOR)
        if IS_MAX:
            total = tl.maximum(total, part, propagate_nan=tl.PropagateNan.ALL)
        else:
            total += part
    tl.store(tensor_ptr + index, total.to(dtype), mask=mask)
    tl.store(epochs_ptr + chunk, epoch)


def one_shot_all_reduce(tensor: Tensor, op: ReduceOp, tables: StagingTables) -> Tensor:
    """Combine `tensor` over ranks IN PLACE on the current stream; at most `slot_bytes` of it.

    Safe in graph capture: nothing on the host changes from call to call. All ranks must launch
    the same calls in the same order, each from one stream. After an abort the contents are
    undefined.
    """
    assert 0 < tensor.nbytes <= tables.slot_bytes
    kernel, arguments = launch_arguments(tensor, op, tables)
    grid = (-(-tensor.nbytes // CHUNK_BYTES),)
    kernel[grid](*arguments, num_warps=_NUM_WARPS)
    return tensor


def compile_all_reduce(tensor: Tensor, op: ReduceOp, tables: StagingTables) -> None:
    """Compile the variant that `tensor` needs, without launching it."""
    kernel, arguments = launch_arguments(tensor, op, tables)
    kernel.warmup(*arguments, num_warps=_NUM_WARPS, grid=(1,))


def launch_arguments(
    tensor: Tensor, op: ReduceOp, tables: StagingTables
) -> tuple[Any, tuple[object, ...]]:
    """The kernel and its arguments, in order. Two variants a dtype: whole vectors, or not."""
    itemsize = tensor.dtype.itemsize
    aligned = tensor.data_ptr() % _VECTOR_BYTES == 0 and tensor.nbytes % _VECTOR_BYTES == 0
    vector = _VECTOR_BYTES // itemsize if aligned else 1
    arguments = (
        tensor,
        tables.bases,
        tables.epochs,
        tables.abort_word,
        tensor.numel() // vector,
        tables.rank,
        tables.slots_offset,
        tables.slot_bytes,
        tables.epochs.numel(),
        tables.bases.numel(),
        CHUNK_BYTES,
        CHUNK_BYTES // itemsize,
        vector,
        op == ReduceOp.MAX,
        _accumulator(tensor.dtype),
    )
    return _one_shot_all_reduce_kernel, arguments


def _accumulator(dtype: torch.dtype) -> object:
    """float32 for floats, integers as they are."""
    integers = {torch.int32: tl.int32, torch.int64: tl.int64}
    return integers.get(dtype, tl.float32)
