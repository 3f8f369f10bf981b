# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Minimum length and penalties in one pass; the reference is in `penalties`."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.kernels.triton_language import jit, tl
from worker.sampling.tables import (
    FREQUENCY_WORD,
    MIN_TOKENS_WORD,
    OUTPUT_MASK,
    PRESENCE_WORD,
    PROMPT_LEN_WORD,
    REPETITION_WORD,
    ROW_WORDS,
    STOP_IDS_WORD,
    SlotSampling,
)
from worker.sampling_params import MAX_STOP_IDS

_BLOCK = 2048


@jit(unaligned=("slots_ptr", "positions_ptr"))
def _penalty_kernel(
    logits_ptr,
    slots_ptr,
    positions_ptr,
    params_ptr,
    counts_ptr,
    out_ptr,
    logits_stride,
    vocab_start,
    VOCAB: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    REPETITION: tl.constexpr,
    PRESENCE: tl.constexpr,
    FREQUENCY: tl.constexpr,
    PROMPT_LEN: tl.constexpr,
    MIN_TOKENS: tl.constexpr,
    STOP_IDS: tl.constexpr,
    NUM_STOP_IDS: tl.constexpr,
    OUTPUT_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < VOCAB
    slot = tl.load(slots_ptr + row)
    params = params_ptr + slot * ROW_WORDS
    logit = tl.load(logits_ptr + row * logits_stride + columns, mask=inside, other=0.0)
    num_outputs = tl.load(positions_ptr + row) - tl.load(params + PROMPT_LEN)
    if num_outputs < tl.load(params + MIN_TOKENS):
        for index in tl.static_range(NUM_STOP_IDS):
            stop_id = tl.load(params + STOP_IDS + index)
            # Unused places hold -1, which may be a column of a later shard.
            is_stop = (stop_id >= 0) & (columns + vocab_start == stop_id)
            logit = tl.where(is_stop, float("-inf"), logit)
    count = tl.load(counts_ptr + slot * VOCAB + columns, mask=inside, other=0)
    outputs = count & OUTPUT_MASK
    repetition = tl.load(params + REPETITION).to(tl.float32, bitcast=True)
    frequency = tl.load(params + FREQUENCY).to(tl.float32, bitcast=True)
    presence = tl.load(params + PRESENCE).to(tl.float32, bitcast=True)
    repeated = tl.where(logit > 0.0, tl.div_rn(logit, repetition), logit * repetition)
    logit = tl.where(count != 0, repeated, logit)
    logit = logit - frequency * outputs.to(tl.float32)
    logit = logit - presence * (outputs > 0).to(tl.float32)
    tl.store(out_ptr + row * VOCAB + columns, logit, mask=inside)


def apply_penalties_kernel(
    logits: Tensor, slots: Tensor, positions: Tensor, tables: SlotSampling
) -> Tensor:
    """`penalties.apply_penalties_reference`, bit for bit."""
    num_rows, vocab = logits.shape
    assert logits.stride(1) == 1 and tables.counts.shape[1] == vocab
    assert slots.is_contiguous() and positions.is_contiguous()
    out = torch.empty(num_rows, vocab, dtype=torch.float32, device=logits.device)
    _penalty_kernel[(num_rows, -(-vocab // _BLOCK))](
        logits,
        slots,
        positions,
        tables.packed,
        tables.counts,
        out,
        logits.stride(0),
        tables.vocab_start,
        VOCAB=vocab,
        ROW_WORDS=ROW_WORDS,
        REPETITION=REPETITION_WORD,
        PRESENCE=PRESENCE_WORD,
        FREQUENCY=FREQUENCY_WORD,
        PROMPT_LEN=PROMPT_LEN_WORD,
        MIN_TOKENS=MIN_TOKENS_WORD,
        STOP_IDS=STOP_IDS_WORD,
        NUM_STOP_IDS=MAX_STOP_IDS,
        OUTPUT_MASK=OUTPUT_MASK,
        BLOCK=_BLOCK,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return out
