"""What changes logits before the choice: minimum length, then penalties."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worker.sampling.penalty_kernel import apply_penalties_kernel
from worker.sampling.tables import OUTPUT_MASK, RowParams, SlotSampling


def apply_penalties_reference(
    logits: Tensor, slots: Tensor, positions: Tensor, tables: SlotSampling
) -> Tensor:
    """A new float32 [N, padded_vocab]: stop ids masked to -inf before the minimum length, and
    seen tokens penalised.

    Repetition (Keskar et al. 2019, CTRL) covers prompt and output: positive logits are divided,
    negative ones multiplied. Presence and frequency cover the output.
    """
    rows = tables.rows(slots)
    masked = _mask_stop_ids(logits, positions, rows, tables.vocab_start)
    counts = tables.counts.index_select(0, slots)
    outputs = counts & OUTPUT_MASK
    repetition = rows.repetition[:, None]
    scaled = torch.where(masked > 0, masked / repetition, masked * repetition)
    penalised = torch.where(counts != 0, scaled, masked)
    penalised -= rows.frequency[:, None] * outputs
    penalised -= rows.presence[:, None] * (outputs > 0)
    return penalised


def _mask_stop_ids(logits: Tensor, positions: Tensor, rows: RowParams, vocab_start: int) -> Tensor:
    """A copy of `logits` with the stop ids of rows below their minimum length at -inf."""
    num_outputs = positions - rows.prompt_len
    local = rows.stop_ids.to(torch.int64) - vocab_start
    inside = (rows.stop_ids >= 0) & (local >= 0) & (local < logits.shape[1])
    masked = inside & (num_outputs < rows.min_tokens)[:, None]
    # +inf changes nothing under amin, so unmasked entries may all point at column 0.
    values = torch.where(masked, -math.inf, math.inf)
    return logits.scatter_reduce(1, torch.where(masked, local, 0), values, "amin")


def apply_penalties(
    logits: Tensor, slots: Tensor, positions: Tensor, tables: SlotSampling
) -> Tensor:
    """`apply_penalties_reference`, as one kernel on CUDA."""
    if logits.is_cuda:
        return apply_penalties_kernel(logits, slots, positions, tables)
    return apply_penalties_reference(logits, slots, positions, tables)
