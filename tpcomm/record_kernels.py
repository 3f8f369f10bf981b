# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment, var-annotated, unreachable"
"""Kernels write each collective to a ring in device memory (records says what an entry is).

Program 0 writes alone, without a load, a fence or a wait: an entry when its part has been sent, its
end when its own receive is complete, and then it adds to the totals behind the last entry. Device
memory, not the host's, since a kernel does not end before its stores have arrived. An entry without
end is where this rank waits; an abort that frees it writes the end too, so read before aborting.

NCCL's kernels are not ours, so a small kernel stamps before each and one after.
"""

from __future__ import annotations

from torch import Tensor

from tpcomm.records import (
    ENTRY_WORDS,
    NCCL_SEQUENCES,
    RING_ENTRIES,
    SEQUENCE_WRAP,
    pack,
)
from tpcomm.size_table import NCCL
from tpcomm.triton_language import Launch, after_previous, constant, device_function, jit, tl

_ENTRIES = constant(RING_ENTRIES)
_WORDS = constant(ENTRY_WORDS)
_WRAP = constant(SEQUENCE_WRAP)
_NCCL_SEQUENCES = constant(NCCL_SEQUENCES)
_STAMP_BLOCK = 512
_STAMP_WARPS = 4


@device_function
def clock_ns():
    """Nanoseconds of this device's clock."""
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )


@device_function
def write_begin(ring_ptr, sequence, what, begun):
    """A fresh entry, without end."""
    word = tl.arange(0, _WORDS)
    entry = tl.where(word == 0, sequence, tl.where(word == 1, what, 0))
    entry = tl.where(word == 2, begun, entry)
    tl.store(ring_ptr + (sequence % _ENTRIES) * _WORDS + word, entry)


@device_function
def write_end(ring_ptr, sequence, begun):
    """The end of the entry of `sequence`, and what it adds to the totals."""
    ended = clock_ns()
    tl.store(ring_ptr + (sequence % _ENTRIES) * _WORDS + (_WORDS - 1), ended)
    totals = ring_ptr + _ENTRIES * _WORDS
    # Nobody waits for the sums: without a use of their results they are reductions, not loads.
    tl.atomic_add(totals, 1, sem="relaxed")
    tl.atomic_add(totals + 1, ended - begun, sem="relaxed")


@device_function
def record_begin(ring_ptr, state, num_bytes, CODE: tl.constexpr):
    """The call of `state` has sent its part; returns when. CODE 0 records nothing."""
    begun = state
    if CODE != 0:
        begun = clock_ns()
        if tl.program_id(0) == 0:
            write_begin(ring_ptr, state >> 32, num_bytes.to(tl.int64) + CODE, begun)
    return begun


@device_function
def record_end(ring_ptr, state, begun, CODE: tl.constexpr):
    """The call of `state`, which began then, has received all that program 0 needs."""
    if CODE != 0:  # noqa: SIM102  decided when it is compiled
        if tl.program_id(0) == 0:
            write_end(ring_ptr, state >> 32, begun)


@device_function
def next_sequence(sequence, step):
    """`step` calls later."""
    later = sequence + step
    return tl.where(later >= _WRAP, later - _WRAP, later)


@jit(varying=("what",))
def tpcomm_stamp_begin(state_ptr, ring_ptr, what):
    after_previous()
    write_begin(ring_ptr, tl.load(state_ptr) >> 32, what.to(tl.int64), clock_ns())


@jit(varying=())
def tpcomm_stamp_end(state_ptr, ring_ptr, NUM_STATES: tl.constexpr, BLOCK: tl.constexpr):
    after_previous()
    state = tl.load(state_ptr)
    sequence = state >> 32
    begun = tl.load(ring_ptr + (sequence % _ENTRIES) * _WORDS + 2)
    write_end(ring_ptr, sequence, begun)
    tl.debug_barrier()  # as in end_call: all threads have read the state
    # By as many as there are buffers, so that staged calls find the one that they expect.
    fresh = (next_sequence(sequence, _NCCL_SEQUENCES) << 32) | (state & 0xFFFFFFFF)
    for start in tl.static_range(0, NUM_STATES, BLOCK):
        index = start + tl.arange(0, BLOCK)
        tl.store(state_ptr + index, fresh + tl.zeros([BLOCK], tl.int64), mask=index < NUM_STATES)


def begin_stamp(state: Tensor, ring: Tensor, operation: str, num_bytes: int) -> Launch:
    """Says that NCCL is about to carry an operation, in stream order."""
    arguments = (state, ring, pack(operation, NCCL, num_bytes))
    return Launch(tpcomm_stamp_begin, arguments, 1, 1)


def end_stamp(state: Tensor, ring: Tensor) -> Launch:
    """Says that NCCL's call is complete on this rank, and counts it."""
    arguments = (state, ring, state.numel(), _STAMP_BLOCK)
    return Launch(tpcomm_stamp_end, arguments, 1, _STAMP_WARPS)
