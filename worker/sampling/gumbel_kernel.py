# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The shard's best perturbed token of every row in two kernels, and noise for listed tokens.

The references are `local_best.best_reference` and `philox.gumbel_at_reference`. Both kernels here
share the code that makes noise, and neither may fuse a multiplication with an addition: a token
must get the same bits whichever of them computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcomm.triton_language import after_previous, early_launch
from worker.kernels.triton_language import jit, next_power_of_2, tl
from worker.sampling.record import RECORD_WORDS, Bounds
from worker.sampling.tables import (
    INV_TEMPERATURE_WORD,
    ROW_WORDS,
    TEMPERATURE_WORD,
    SlotSampling,
)

# Tokens come in groups of four that share a Philox block. A program takes a fixed number of
# groups, so that one row still spreads over a device and many rows need no second grid.
_GROUPS_PER_BLOCK = 256
_GROUPS_PER_PROGRAM = 1024
_PARTIAL_WORDS = 4
_NO_ID = 0x7FFFFFFF


@jit()
def gumbel_of_words(words):
    """Standard Gumbel float32 of uint32 words, as `philox.gumbel_from_bits`."""
    uniform = words.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    uniform = tl.minimum(uniform, 0.99999994039535522461)
    # -log1p(-u): the logarithm near 1 is only absolutely precise, so small u take the series.
    series = 0.125
    series = series * uniform + 0.14285714285714285
    series = series * uniform + 0.16666666666666666
    series = series * uniform + 0.2
    series = series * uniform + 0.25
    series = series * uniform + 0.33333333333333333
    series = series * uniform + 0.5
    series = series * uniform + 1.0
    exponential = tl.where(uniform < 0.0625, series * uniform, -tl.log(1.0 - uniform))
    return -tl.log(exponential)


@jit()
def _load_seed(row_params_ptr):
    low = tl.load(row_params_ptr).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(row_params_ptr + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    return low | (high << 32)


@jit(unaligned=("slots_ptr", "positions_ptr", "low_ptr", "high_ptr"))
def _shard_best_kernel(
    logits_ptr,
    raw_ptr,
    slots_ptr,
    positions_ptr,
    params_ptr,
    low_ptr,
    high_ptr,
    partial_ptr,
    logits_stride,
    raw_stride,
    vocab_start,
    VOCAB: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    INV_TEMPERATURE: tl.constexpr,
    NO_ID: tl.constexpr,
    NOISE: tl.constexpr,
    BOUNDED: tl.constexpr,
    STATS: tl.constexpr,
    GROUPS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    after_previous()
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    params = params_ptr + tl.load(slots_ptr + row) * ROW_WORDS
    temperature = tl.load(params + TEMPERATURE).to(tl.float32, bitcast=True)
    inv_temperature = tl.load(params + INV_TEMPERATURE).to(tl.float32, bitcast=True)
    seed = _load_seed(params)
    position = tl.load(positions_ptr + row).to(tl.int32)
    lanes = tl.arange(0, 4)
    best = tl.full((GROUPS, 4), float("-inf"), tl.float32)
    best_id = tl.full((GROUPS, 4), NO_ID, tl.int32)
    raw_max = tl.full((GROUPS, 4), float("-inf"), tl.float32)
    raw_sum = tl.zeros((GROUPS, 4), tl.float32)
    for block in range(NUM_BLOCKS):
        first_group = (vocab_start >> 2) + (chunk * NUM_BLOCKS + block) * GROUPS
        groups = (first_group + tl.arange(0, GROUPS)).to(tl.int32)
        ids = groups[:, None] * 4 + lanes[None, :]
        columns = ids - vocab_start
        inside = (columns >= 0) & (columns < VOCAB)
        logit = tl.load(
            logits_ptr + row * logits_stride + columns, mask=inside, other=float("-inf")
        ).to(tl.float32)
        # A maximum drops NaN; +inf is as good a sign of a broken row and survives.
        logit = tl.where(logit != logit, float("inf"), logit)
        scaled = logit * inv_temperature
        value = scaled
        if NOISE:
            zero = groups * 0
            w0, w1, w2, w3 = tl.philox(seed, zero + position, groups, zero, zero)
            words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (GROUPS, 4))
            value = tl.where(temperature > 0.0, scaled + gumbel_of_words(words), scaled)
        if BOUNDED:
            competes = (scaled >= tl.load(low_ptr + row)) & (scaled <= tl.load(high_ptr + row))
            value = tl.where(competes, value, float("-inf"))
        # Ids rise from block to block: a strict comparison keeps the lowest of equals.
        better = value > best
        best = tl.where(better, value, best)
        best_id = tl.where(better, ids, best_id)
        if STATS:
            raw = tl.load(
                raw_ptr + row * raw_stride + columns, mask=inside, other=float("-inf")
            ).to(tl.float32)
            new_max = tl.maximum(raw_max, raw)
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            raw_sum = raw_sum * tl.exp(raw_max - shift) + tl.exp(raw - shift)
            raw_max = new_max
    value = tl.max(tl.max(best, axis=1), axis=0)
    token_id = tl.min(tl.min(tl.where(best == value, best_id, NO_ID), axis=1), axis=0)
    partial = partial_ptr + (row * tl.num_programs(1) + chunk) * 4
    tl.store(partial, value.to(tl.int32, bitcast=True))
    tl.store(partial + 1, token_id)
    if STATS:
        chunk_max = tl.max(tl.max(raw_max, axis=1), axis=0)
        shift = tl.where(chunk_max == float("-inf"), 0.0, chunk_max)
        chunk_sum = tl.sum(tl.sum(raw_sum * tl.exp(raw_max - shift), axis=1), axis=0)
        tl.store(partial + 2, chunk_max.to(tl.int32, bitcast=True))
        tl.store(partial + 3, chunk_sum.to(tl.int32, bitcast=True))


@jit()
def _combine_kernel(
    partial_ptr,
    raw_ptr,
    record_ptr,
    raw_stride,
    vocab_start,
    num_chunks,
    NO_ID: tl.constexpr,
    RECORD_WORDS: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    after_previous()
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, BLOCK)
    inside = chunks < num_chunks
    partial = partial_ptr + (row * num_chunks + chunks) * 4
    values = tl.load(partial, mask=inside, other=0).to(tl.float32, bitcast=True)
    values = tl.where(inside, values, float("-inf"))
    ids = tl.load(partial + 1, mask=inside, other=NO_ID)
    value = tl.max(values, axis=0)
    token_id = tl.min(tl.where(values == value, ids, NO_ID), axis=0)
    # Where nothing competes there is no id; the first column keeps the load below legal.
    token_id = tl.where(token_id == NO_ID, vocab_start, token_id)
    raw = tl.load(raw_ptr + row * raw_stride + (token_id - vocab_start)).to(tl.float32)
    record = record_ptr + row * RECORD_WORDS
    tl.store(record, value.to(tl.int32, bitcast=True))
    tl.store(record + 1, token_id)
    tl.store(record + 2, raw.to(tl.int32, bitcast=True))
    overall_max = tl.zeros((), tl.float32)
    overall_sum = tl.zeros((), tl.float32)
    if STATS:
        maxima = tl.load(partial + 2, mask=inside, other=0).to(tl.float32, bitcast=True)
        maxima = tl.where(inside, maxima, float("-inf"))
        sums = tl.load(partial + 3, mask=inside, other=0).to(tl.float32, bitcast=True)
        overall_max = tl.max(maxima, axis=0)
        shift = tl.where(overall_max == float("-inf"), 0.0, overall_max)
        overall_sum = tl.sum(tl.where(inside, sums * tl.exp(maxima - shift), 0.0), axis=0)
    tl.store(record + 3, overall_max.to(tl.int32, bitcast=True))
    tl.store(record + 4, overall_sum.to(tl.int32, bitcast=True))


def gumbel_argmax(
    logits: Tensor,
    raw: Tensor,
    slots: Tensor,
    positions: Tensor,
    tables: SlotSampling,
    bounds: Bounds | None,
    all_greedy: bool,
    with_stats: bool,
) -> Tensor:
    """Records int32 [N, RECORD_WORDS] of `logits` [N, V], as `local_best` describes."""
    num_rows, vocab = logits.shape
    assert logits.stride(1) == 1 and raw.stride(1) == 1 and raw.shape == logits.shape
    assert slots.is_contiguous() and positions.is_contiguous()
    num_groups = ((tables.vocab_start + vocab + 3) >> 2) - (tables.vocab_start >> 2)
    num_chunks = -(-num_groups // _GROUPS_PER_PROGRAM)
    device = logits.device
    partial = torch.empty(num_rows, num_chunks, _PARTIAL_WORDS, dtype=torch.int32, device=device)
    record = torch.empty(num_rows, RECORD_WORDS, dtype=torch.int32, device=device)
    _shard_best_kernel[(num_rows, num_chunks)](
        logits,
        raw,
        slots,
        positions,
        tables.packed,
        logits if bounds is None else bounds.low,
        logits if bounds is None else bounds.high,
        partial,
        logits.stride(0),
        raw.stride(0),
        tables.vocab_start,
        VOCAB=vocab,
        ROW_WORDS=ROW_WORDS,
        TEMPERATURE=TEMPERATURE_WORD,
        INV_TEMPERATURE=INV_TEMPERATURE_WORD,
        NO_ID=_NO_ID,
        NOISE=not all_greedy,
        BOUNDED=bounds is not None,
        STATS=with_stats,
        GROUPS=_GROUPS_PER_BLOCK,
        NUM_BLOCKS=_GROUPS_PER_PROGRAM // _GROUPS_PER_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
        **early_launch(),
    )
    _combine_kernel[(num_rows,)](
        partial,
        raw,
        record,
        raw.stride(0),
        tables.vocab_start,
        num_chunks,
        NO_ID=_NO_ID,
        RECORD_WORDS=RECORD_WORDS,
        STATS=with_stats,
        BLOCK=next_power_of_2(num_chunks),
        num_warps=1,
        **early_launch(),
    )
    return record


@jit(unaligned=("seed_ptr", "positions_ptr"))
def _gumbel_at_kernel(
    seed_ptr, seed_stride, positions_ptr, ids_ptr, out_ptr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < COUNT
    seed = tl.load(seed_ptr + row * seed_stride).to(tl.uint64, bitcast=True)
    position = tl.load(positions_ptr + row).to(tl.int32)
    ids = tl.load(ids_ptr + row * COUNT + places, mask=inside, other=0).to(tl.int32)
    groups = ids >> 2
    lane = ids & 3
    zero = groups * 0
    w0, w1, w2, w3 = tl.philox(seed, zero + position, groups, zero, zero)
    words = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    tl.store(out_ptr + row * COUNT + places, gumbel_of_words(words), mask=inside)


def gumbel_at(seed: Tensor, position: Tensor, token_ids: Tensor) -> Tensor:
    """float32 [N, C] noise of `token_ids` int64 [N, C]; seed and position are int64 [N]."""
    num_rows, count = token_ids.shape
    assert token_ids.is_contiguous() and position.is_contiguous()
    out = torch.empty(num_rows, count, dtype=torch.float32, device=token_ids.device)
    block = 128
    _gumbel_at_kernel[(num_rows, -(-count // block))](
        seed,
        seed.stride(0),
        position,
        token_ids,
        out,
        COUNT=count,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out
