# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment, var-annotated, unreachable"
"""The steps that kernels over staging memory are made of; the protocol is in staging_tables.

Device functions: called by kernels, never launched.
"""

from __future__ import annotations

from tpcomm.record_kernels import next_sequence
from tpcomm.triton_language import device_function, tl


@device_function
def begin_call(state_ptr, SLOT_BYTES: tl.constexpr, WORLD_SIZE: tl.constexpr):
    """(state, offset of this call's buffer, offset of the buffer to wipe), offsets in bytes."""
    state = tl.load(state_ptr + tl.program_id(0))
    buffer = (state >> 32).to(tl.int32) % 3
    before = (buffer + 2) % 3
    return state, buffer * (WORLD_SIZE * SLOT_BYTES), before * (WORLD_SIZE * SLOT_BYTES)


@device_function
def end_call(state_ptr, state, used_bytes, NUM_STATES: tl.constexpr, BLOCK: tl.constexpr):
    """Move all state entries to the next call; `used_bytes` of each row were sent to."""
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    # Every thread has read the state by itself: a warp that is late must not find the next call's.
    tl.debug_barrier()
    fresh = (next_sequence(state >> 32, 1) << 32) | used_bytes.to(tl.int64)
    tl.store(state_ptr + program, fresh)
    share = tl.cdiv(NUM_STATES - num_programs, num_programs)
    first = num_programs + program * share
    end = tl.minimum(first + share, NUM_STATES)
    start = first
    while start < end:  # not range(): the interpreter takes no tensors there
        index = start + tl.arange(0, BLOCK)
        tl.store(state_ptr + index, fresh + tl.zeros([BLOCK], tl.int64), mask=index < end)
        start += BLOCK


@device_function
def wipe(
    own_base,
    state,
    wiped,
    RANK: tl.constexpr,
    SLOT_BYTES: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Set this program's share of the peers' rows at `wiped` back to ones."""
    num_words = ((state & 0xFFFFFFFF).to(tl.int32) + 15) // 16 * 2
    ones = tl.full([BLOCK], -1, tl.int64)
    for step in tl.static_range(1, WORLD_SIZE):
        peer = (RANK + step) % WORLD_SIZE
        row = tl.multiple_of(
            (own_base + wiped + peer * SLOT_BYTES).to(tl.pointer_type(tl.int64)), 16
        )
        start = tl.program_id(0) * BLOCK
        while start < num_words:
            index = tl.multiple_of(start, 2) + tl.arange(0, BLOCK)
            tl.store(row + index, ones, mask=index // 2 < num_words // 2)
            start += tl.num_programs(0) * BLOCK


@device_function
def word_row(base, place, row, SLOT_BYTES: tl.constexpr, WORD: tl.constexpr):
    """Address of row `row` of the buffer at `place` in the memory at `base`, as words."""
    address = (base + place + row * SLOT_BYTES).to(tl.pointer_type(WORD))
    return tl.multiple_of(address, 16)


@device_function
def send(pointer, words, mask):
    """Store to a peer, past all caches."""
    tl.store(pointer, words, mask=mask, cache_modifier=".wt")


@device_function
def receive(pointer, mask, abort_ptr):
    """Poll own memory until every word under `mask` has arrived, or the abort word is set."""
    words = tl.load(pointer, mask=mask, other=0, volatile=True)
    pending = tl.max((words == -1).to(tl.int32), axis=None)
    while pending != 0:
        aborted = tl.load(abort_ptr, volatile=True)
        words = tl.load(pointer, mask=mask, other=0, volatile=True)
        # One value for all threads: they read the abort word at different moments.
        pending = tl.max(((words == -1) & (aborted == 0)).to(tl.int32), axis=None)
    return words


@device_function
def float_words(values, WORD: tl.constexpr):
    """Floats as integers of their width, none of which is all ones."""
    words = values.to(WORD, bitcast=True)
    return tl.where(words == -1, -2, words).to(WORD)


@device_function
def look(
    row_of_rank_0, offsets, own_words, mask, RANK: tl.constexpr, ROW_WORDS: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
):  # fmt: skip
    """What now is in all ranks' rows, our own words among them: a tuple by rank."""
    arrived = ()
    for peer in tl.static_range(WORLD_SIZE):  # all on their way before one is looked at
        if peer == RANK:
            words = own_words
        else:
            row = row_of_rank_0 + peer * ROW_WORDS + offsets
            words = tl.load(row, mask=mask, other=0, volatile=True)
        arrived = arrived + (words,)
    return arrived


@device_function
def combine(
    arrived, RANK: tl.constexpr, WORLD_SIZE: tl.constexpr, DTYPE: tl.constexpr,
    IS_MAX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(total, where something is missing) of what a look has found.

    The total combines it in rank order, in float32: the same additions in the same order on every
    rank, so the same bits. Where something is missing it is NaN, which all ones are.
    """
    total = tl.zeros([BLOCK], tl.float32)
    missing = tl.zeros([BLOCK], tl.int32)
    for peer in tl.static_range(WORLD_SIZE):
        words = arrived[peer]
        if peer != RANK:
            missing |= (words == -1).to(tl.int32)
        value = words.to(DTYPE, bitcast=True).to(tl.float32)
        if peer == 0:
            total = value
        elif IS_MAX:
            total = tl.maximum(total, value, propagate_nan=tl.PropagateNan.ALL)
        else:
            total += value
    return total, missing


@device_function
def receive_sum(
    row_of_rank_0, offsets, own_words, mask, RANK: tl.constexpr, abort_ptr,
    ROW_WORDS: tl.constexpr, WORLD_SIZE: tl.constexpr, DTYPE: tl.constexpr, IS_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Looks until nothing is missing, or the abort word is set; returns the total."""
    total = tl.zeros([BLOCK], tl.float32)
    pending = 1
    while pending != 0:
        aborted = tl.load(abort_ptr, volatile=True)
        arrived = look(row_of_rank_0, offsets, own_words, mask, RANK, ROW_WORDS, WORLD_SIZE)
        total, missing = combine(arrived, RANK, WORLD_SIZE, DTYPE, IS_MAX, BLOCK)
        pending = tl.max(missing & (aborted == 0).to(tl.int32), axis=0)
    return total
