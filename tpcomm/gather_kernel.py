# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""All-gather of small tensors over the peers' staging memory (protocol: staging_tables).

Bytes of any dtype travel as 16-bit words, so twice the bytes: for what is small.
"""

from __future__ import annotations

from torch import Tensor

from tpcomm.communicator import as_bytes
from tpcomm.push_protocol import begin_call, end_call, receive, send, wipe, word_row
from tpcomm.record_kernels import record_begin, record_end
from tpcomm.size_table import ALL_GATHER, STAGED
from tpcomm.staging_tables import (
    CHUNK_BYTES,
    NUM_WARPS,
    VECTOR_BYTES,
    StagingTables,
    vector_width,
)
from tpcomm.triton_language import Launch, after_previous, jit, tl

_WORD_BYTES = 2


@jit(varying=("source_ptr", "target_ptr", "num_vectors"))
def tpcomm_all_gather(
    source_ptr,
    target_ptr,
    bases_ptr,
    state_ptr,
    abort_ptr,
    ring_ptr,
    num_vectors,
    RANK: tl.constexpr,
    SLOT_BYTES: tl.constexpr,
    NUM_STATES: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
    CODE: tl.constexpr,
    PADDED_WORLD: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    after_previous()
    offsets = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    mask = offsets // VECTOR < num_vectors
    byte_pointer = tl.pointer_type(tl.uint8)
    if VECTOR > 1:
        source_ptr = tl.multiple_of(source_ptr.to(tl.int64).to(byte_pointer), 16)
        target_ptr = tl.multiple_of(target_ptr.to(tl.int64).to(byte_pointer), 16)
    own_base = tl.load(bases_ptr + RANK)
    own_words = tl.load(source_ptr + offsets, mask=mask, other=0).to(tl.int16)
    state, place, wiped = begin_call(state_ptr, SLOT_BYTES, WORLD_SIZE)
    for step in tl.static_range(1, WORLD_SIZE):
        base = tl.load(bases_ptr + (RANK + step) % WORLD_SIZE)
        send(word_row(base, place, RANK, SLOT_BYTES, tl.int16) + offsets, own_words, mask)
    num_bytes = num_vectors * VECTOR
    wipe(own_base, state, wiped, RANK, SLOT_BYTES, WORLD_SIZE, CHUNK // 4)
    end_call(state_ptr, state, num_bytes * 2, NUM_STATES, CHUNK)
    begun = record_begin(ring_ptr, state, num_bytes, CODE)

    tl.store(target_ptr + RANK * num_bytes + offsets, own_words.to(tl.uint8), mask=mask)
    peers = tl.arange(0, PADDED_WORLD)[:, None]
    arrives = mask[None, :] & (peers != RANK) & (peers < WORLD_SIZE)
    rows = word_row(own_base, place, 0, SLOT_BYTES, tl.int16)
    words = receive(rows + peers * (SLOT_BYTES // 2) + offsets[None, :], arrives, abort_ptr)
    tl.store(target_ptr + peers * num_bytes + offsets[None, :], words.to(tl.uint8), mask=arrives)
    record_end(ring_ptr, state, begun, CODE)


def gather_bytes(tensor: Tensor) -> int:
    """What an all-gather of `tensor` needs of a slot."""
    return -(-tensor.nbytes // VECTOR_BYTES) * VECTOR_BYTES * _WORD_BYTES


def fits_gather(tensor: Tensor, tables: StagingTables) -> bool:
    """Whether `small_all_gather` takes `tensor`."""
    num_programs = -(-tensor.nbytes // (CHUNK_BYTES // _WORD_BYTES))
    fits = 0 < gather_bytes(tensor) <= tables.slot_bytes
    return fits and tables.fits(num_programs, NUM_WARPS)


def small_all_gather(tensor: Tensor, out: Tensor, tables: StagingTables) -> Tensor:
    """Fill `out` [world_size, *tensor.shape] on the current stream; neither is empty.

    `fits_gather` holds. Otherwise as `one_shot_all_reduce`.
    """
    gather_launch(tensor, out, tables).run()
    return out


def gather_launch(tensor: Tensor, out: Tensor, tables: StagingTables) -> Launch:
    """What `small_all_gather` runs."""
    assert fits_gather(tensor, tables), (tensor.shape, tables.slot_bytes)
    source, target = as_bytes(tensor), as_bytes(out)
    vector = vector_width(source, target)
    if source.numel() % VECTOR_BYTES:
        vector = 1
    world_size, chunk = tables.world_size, CHUNK_BYTES // _WORD_BYTES
    arguments = (
        source,
        target,
        *tables.addresses,
        source.numel() // vector,
        tables.rank,
        tables.slot_bytes,
        tables.state.numel(),
        world_size,
        tables.code(ALL_GATHER, STAGED),
        1 << (world_size - 1).bit_length(),
        chunk,
        vector,
    )
    return Launch(tpcomm_all_gather, arguments, -(-source.numel() // chunk), NUM_WARPS)
