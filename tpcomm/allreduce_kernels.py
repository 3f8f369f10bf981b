# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""All-reduce over the peers' staging memory (protocol: staging_tables).

One-shot: every rank sends its whole message to every peer, and each combines all. One way over the
link, world_size - 1 times the bytes.

Two-shot: rank j combines slice j and sends the result to all. Two ways over the link, but only
2 (world_size - 1) / world_size times the bytes: for large messages of more than two ranks.

A program waits only for the same program of its peers, after it has sent its own part, so a message
of more programs than run at once gets through where the device starts programs in order, as
NVIDIA's do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpcomm.communicator import ReduceOp
from tpcomm.push_protocol import (
    begin_call,
    end_call,
    float_words,
    receive,
    receive_sum,
    send,
    wipe,
    word_row,
)
from tpcomm.record_kernels import record_begin, record_end
from tpcomm.records import ALL_REDUCE_MAX
from tpcomm.size_table import ALL_REDUCE, ONE_SHOT, TWO_SHOT
from tpcomm.staging_tables import CHUNK_BYTES, NUM_WARPS, StagingTables, vector_width
from tpcomm.triton_language import Launch, after_previous, jit, tl

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_WORD_TYPES = {4: "int32", 2: "int16"}


@jit(varying=("tensor_ptr", "num_vectors"))
def tpcomm_one_shot_all_reduce(
    tensor_ptr,
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
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
    IS_MAX: tl.constexpr,
    WORD: tl.constexpr,
):
    after_previous()
    program = tl.program_id(0)
    dtype = tensor_ptr.dtype.element_ty
    offsets = program * CHUNK + tl.arange(0, CHUNK)
    mask = offsets // VECTOR < num_vectors
    if VECTOR > 1:  # a hint on the argument itself is lost
        tensor_ptr = tl.multiple_of(tensor_ptr.to(tl.int64).to(tl.pointer_type(dtype)), 16)
    own_base = tl.load(bases_ptr + RANK)
    own_words = float_words(tl.load(tensor_ptr + offsets, mask=mask, other=0.0), WORD)
    state, place, wiped = begin_call(state_ptr, SLOT_BYTES, WORLD_SIZE)
    for step in tl.static_range(1, WORLD_SIZE):
        base = tl.load(bases_ptr + (RANK + step) % WORLD_SIZE)
        send(word_row(base, place, RANK, SLOT_BYTES, WORD) + offsets, own_words, mask)
    word_bytes: tl.constexpr = WORD.primitive_bitwidth // 8
    num_bytes = num_vectors * (VECTOR * word_bytes)
    wipe(own_base, state, wiped, RANK, SLOT_BYTES, WORLD_SIZE, CHUNK * word_bytes // 8)
    end_call(state_ptr, state, num_bytes, NUM_STATES, CHUNK)
    begun = record_begin(ring_ptr, state, num_bytes, CODE)
    first_row = word_row(own_base, place, 0, SLOT_BYTES, WORD)
    row_words: tl.constexpr = SLOT_BYTES // word_bytes
    total = receive_sum(
        first_row, offsets, own_words, mask, RANK, abort_ptr, row_words, WORLD_SIZE, dtype,
        IS_MAX, CHUNK,
    )  # fmt: skip
    tl.store(tensor_ptr + offsets, total.to(dtype), mask=mask)
    record_end(ring_ptr, state, begun, CODE)


@jit(varying=("tensor_ptr", "num_elements"))
def tpcomm_one_shot_integer_all_reduce(
    tensor_ptr,
    bases_ptr,
    state_ptr,
    abort_ptr,
    ring_ptr,
    num_elements,
    RANK: tl.constexpr,
    SLOT_BYTES: tl.constexpr,
    NUM_STATES: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
    CODE: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_MAX: tl.constexpr,
    HALVES: tl.constexpr,
):
    after_previous()
    # An element goes as HALVES words of 32 bits, each in 64: a program's low halves, then its high.
    program = tl.program_id(0)
    dtype = tensor_ptr.dtype.element_ty
    offsets = program * CHUNK + tl.arange(0, CHUNK)
    mask = offsets < num_elements
    own_base = tl.load(bases_ptr + RANK)
    values = tl.load(tensor_ptr + offsets, mask=mask, other=0).to(tl.int64)
    wire = program * (CHUNK * HALVES) + tl.arange(0, CHUNK)
    state, place, wiped = begin_call(state_ptr, SLOT_BYTES, WORLD_SIZE)
    for step in tl.static_range(1, WORLD_SIZE):
        base = tl.load(bases_ptr + (RANK + step) % WORLD_SIZE)
        row = word_row(base, place, RANK, SLOT_BYTES, tl.int64) + wire
        send(row, values & 0xFFFFFFFF, mask)
        if HALVES == 2:
            send(row + CHUNK, (values >> 32) & 0xFFFFFFFF, mask)
    wipe(own_base, state, wiped, RANK, SLOT_BYTES, WORLD_SIZE, CHUNK)
    used = tl.num_programs(0) * (CHUNK * HALVES * 8)
    end_call(state_ptr, state, used, NUM_STATES, CHUNK)
    begun = record_begin(ring_ptr, state, num_elements * (HALVES * 4), CODE)
    for peer in tl.static_range(WORLD_SIZE):
        row = word_row(own_base, place, peer, SLOT_BYTES, tl.int64) + wire
        arrives = mask & (peer != RANK)
        theirs = receive(row, arrives, abort_ptr)
        if HALVES == 2:
            theirs |= receive(row + CHUNK, arrives, abort_ptr) << 32
        else:
            theirs = theirs.to(tl.int32).to(tl.int64)
        part = tl.where(peer == RANK, values, theirs)
        if peer == 0:
            total = part
        elif IS_MAX:
            total = tl.maximum(total, part)
        else:
            total += part
    tl.store(tensor_ptr + offsets, total.to(dtype), mask=mask)
    record_end(ring_ptr, state, begun, CODE)


@jit(varying=("tensor_ptr", "num_vectors", "slice_vectors"))
def tpcomm_two_shot_all_reduce(
    tensor_ptr,
    bases_ptr,
    state_ptr,
    abort_ptr,
    ring_ptr,
    num_vectors,
    slice_vectors,
    RANK: tl.constexpr,
    SLOT_BYTES: tl.constexpr,
    NUM_STATES: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
    CODE: tl.constexpr,
    PADDED_WORLD: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
    IS_MAX: tl.constexpr,
    WORD: tl.constexpr,
):
    after_previous()
    # Rows hold what is to be combined, then from `results` on what has been.
    program = tl.program_id(0)
    dtype = tensor_ptr.dtype.element_ty
    offsets = program * CHUNK + tl.arange(0, CHUNK)
    results = tl.num_programs(0) * CHUNK
    in_slice = offsets // VECTOR < slice_vectors
    slice_len = slice_vectors * VECTOR
    if VECTOR > 1:
        tensor_ptr = tl.multiple_of(tensor_ptr.to(tl.int64).to(tl.pointer_type(dtype)), 16)
    own_base = tl.load(bases_ptr + RANK)
    state, place, wiped = begin_call(state_ptr, SLOT_BYTES, WORLD_SIZE)
    for step in tl.static_range(1, WORLD_SIZE):
        owner = (RANK + step) % WORLD_SIZE
        index = owner * slice_len + offsets
        inside = in_slice & (owner * slice_vectors + offsets // VECTOR < num_vectors)
        words = float_words(tl.load(tensor_ptr + index, mask=inside, other=0.0), WORD)
        base = tl.load(bases_ptr + owner)
        send(word_row(base, place, RANK, SLOT_BYTES, WORD) + offsets, words, inside)

    own_index = RANK * slice_len + offsets
    mask = in_slice & (RANK * slice_vectors + offsets // VECTOR < num_vectors)
    own_words = float_words(tl.load(tensor_ptr + own_index, mask=mask, other=0.0), WORD)
    word_bytes: tl.constexpr = WORD.primitive_bitwidth // 8
    row_words: tl.constexpr = SLOT_BYTES // word_bytes
    wipe(own_base, state, wiped, RANK, SLOT_BYTES, WORLD_SIZE, CHUNK * word_bytes // 8)
    end_call(state_ptr, state, results * (2 * word_bytes), NUM_STATES, CHUNK)
    begun = record_begin(ring_ptr, state, num_vectors * (VECTOR * word_bytes), CODE)
    first_row = word_row(own_base, place, 0, SLOT_BYTES, WORD)
    total = receive_sum(
        first_row, offsets, own_words, mask, RANK, abort_ptr, row_words, WORLD_SIZE, dtype,
        IS_MAX, CHUNK,
    )  # fmt: skip
    combined = float_words(total.to(dtype), WORD)
    for step in tl.static_range(1, WORLD_SIZE):
        base = tl.load(bases_ptr + (RANK + step) % WORLD_SIZE)
        row = word_row(base, place, RANK, SLOT_BYTES, WORD)
        send(row + results + offsets, combined, mask)
    tl.store(tensor_ptr + own_index, combined.to(dtype, bitcast=True), mask=mask)

    owners = tl.arange(0, PADDED_WORLD)[:, None]
    vectors = owners * slice_vectors + (offsets // VECTOR)[None, :]
    arrives = in_slice[None, :] & (vectors < num_vectors) & (owners != RANK) & (owners < WORLD_SIZE)
    gathered = receive(
        first_row + owners * row_words + (results + offsets)[None, :], arrives, abort_ptr
    )
    target = tensor_ptr + owners * slice_len + offsets[None, :]
    tl.store(target, gathered.to(dtype, bitcast=True), mask=arrives)
    record_end(ring_ptr, state, begun, CODE)


@dataclass(frozen=True)
class Tile:
    """What one program carries: `num_bytes` of a row, by so many warps of 32 threads.

    A warp moves 512 bytes at once. At most one program per entry of `state` may run.
    """

    num_bytes: int = CHUNK_BYTES
    num_warps: int = NUM_WARPS


def fits_one_shot(tensor: Tensor, tables: StagingTables) -> bool:
    """Whether a one-shot all-reduce takes `tensor`, which is contiguous."""
    num_bytes = one_shot_bytes(tensor)
    num_programs = -(-num_bytes // CHUNK_BYTES)
    return 0 < num_bytes <= tables.slot_bytes and tables.fits(num_programs, NUM_WARPS)


def fits_two_shot(tensor: Tensor, tables: StagingTables) -> bool:
    """Whether a two-shot all-reduce takes `tensor`, which is contiguous."""
    if tensor.dtype not in _FLOATS or not tensor.numel():
        return False
    num_programs = _num_slice_tiles(tensor, tables.world_size, CHUNK_BYTES)
    fits = 2 * num_programs * CHUNK_BYTES <= tables.slot_bytes
    return fits and tables.fits(num_programs, NUM_WARPS)


def one_shot_bytes(tensor: Tensor) -> int:
    """What a one-shot all-reduce of `tensor` needs of a slot."""
    return tensor.nbytes if tensor.dtype in _FLOATS else tensor.numel() * _wire_bytes(tensor.dtype)


def two_shot_bytes(tensor: Tensor, world_size: int) -> int:
    """What a two-shot all-reduce of `tensor` needs of a slot."""
    return 2 * _num_slice_tiles(tensor, world_size, CHUNK_BYTES) * CHUNK_BYTES


def one_shot_all_reduce(
    tensor: Tensor, op: ReduceOp, tables: StagingTables, tile: Tile = Tile()
) -> Tensor:
    """Combine `tensor` (not empty, contiguous) over ranks IN PLACE on the current stream.

    `one_shot_bytes` may be at most `slot_bytes`. Safe in graph capture. All ranks issue the same
    calls over their tables in the same order, each from one stream at a time. After an abort the
    contents are undefined.
    """
    one_shot_launch(tensor, op, tables, tile).run()
    return tensor


def two_shot_all_reduce(
    tensor: Tensor, op: ReduceOp, tables: StagingTables, tile: Tile = Tile()
) -> Tensor:
    """As one_shot_all_reduce, for floats; `two_shot_bytes` may be at most `slot_bytes`."""
    two_shot_launch(tensor, op, tables, tile).run()
    return tensor


def one_shot_launch(
    tensor: Tensor, op: ReduceOp, tables: StagingTables, tile: Tile = Tile()
) -> Launch:
    """What `one_shot_all_reduce` runs; two variants a float dtype: whole vectors, or not."""
    assert 0 < one_shot_bytes(tensor) <= tables.slot_bytes, (tensor.shape, tables.slot_bytes)
    num_programs = -(-one_shot_bytes(tensor) // tile.num_bytes)
    assert tables.fits(num_programs, tile.num_warps), num_programs
    addresses = (tensor, *tables.addresses)
    is_max = op == ReduceOp.MAX
    code = tables.code(ALL_REDUCE_MAX if is_max else ALL_REDUCE, ONE_SHOT)
    sizes = (tables.slot_bytes, tables.state.numel(), tables.world_size, code)
    shape: tuple[object, ...]
    arguments: tuple[object, ...]
    if tensor.dtype not in _FLOATS:
        wire_bytes = _wire_bytes(tensor.dtype)
        count = (tensor.numel(), tables.rank)
        shape = (tile.num_bytes // wire_bytes, is_max, wire_bytes // 8)
        arguments = (*addresses, *count, *sizes, *shape)
        return Launch(tpcomm_one_shot_integer_all_reduce, arguments, num_programs, tile.num_warps)
    vector = vector_width(tensor)
    count = (tensor.numel() // vector, tables.rank)
    chunk = tile.num_bytes // tensor.dtype.itemsize
    shape = (chunk, vector, is_max, word_type(tensor.dtype))
    arguments = (*addresses, *count, *sizes, *shape)
    return Launch(tpcomm_one_shot_all_reduce, arguments, num_programs, tile.num_warps)


def two_shot_launch(
    tensor: Tensor, op: ReduceOp, tables: StagingTables, tile: Tile = Tile()
) -> Launch:
    """What `two_shot_all_reduce` runs."""
    world_size = tables.world_size
    assert tensor.numel() and tensor.dtype in _FLOATS, (tensor.shape, tensor.dtype)
    num_programs = _num_slice_tiles(tensor, world_size, tile.num_bytes)
    assert 2 * num_programs * tile.num_bytes <= tables.slot_bytes, tensor.shape
    assert tables.fits(num_programs, tile.num_warps), num_programs
    vector = vector_width(tensor)
    num_vectors = tensor.numel() // vector
    is_max = op == ReduceOp.MAX
    arguments = (
        tensor,
        *tables.addresses,
        num_vectors,
        -(-num_vectors // world_size),
        tables.rank,
        tables.slot_bytes,
        tables.state.numel(),
        world_size,
        tables.code(ALL_REDUCE_MAX if is_max else ALL_REDUCE, TWO_SHOT),
        1 << (world_size - 1).bit_length(),
        tile.num_bytes // tensor.dtype.itemsize,
        vector,
        is_max,
        word_type(tensor.dtype),
    )
    return Launch(tpcomm_two_shot_all_reduce, arguments, num_programs, tile.num_warps)


def word_type(dtype: torch.dtype) -> Any:
    """The integer that a float of this dtype is sent as."""
    return getattr(tl, _WORD_TYPES[dtype.itemsize])


def _wire_bytes(dtype: torch.dtype) -> int:
    """What an integer takes in a row: twice its own size."""
    return 2 * dtype.itemsize


def _num_slice_tiles(tensor: Tensor, world_size: int, tile_bytes: int) -> int:
    vector = vector_width(tensor)
    slice_vectors = -(-(tensor.numel() // vector) // world_size)
    return -(-slice_vectors * vector * tensor.dtype.itemsize // tile_bytes)
