# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Masks of constrained rows in one pass; the reference is in `exclusions`."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.kernels.triton_language import jit, tl

_BLOCK = 2048


@jit(unaligned=("slots_ptr",))
def _mask_kernel(
    logits_ptr,
    slots_ptr,
    masks_ptr,
    out_ptr,
    logits_stride,
    VOCAB: tl.constexpr,
    MASK_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < VOCAB
    slot = tl.load(slots_ptr + row)
    logit = tl.load(logits_ptr + row * logits_stride + columns, mask=inside, other=0.0)
    bits = tl.load(masks_ptr + slot * MASK_BYTES + columns // 8, mask=inside, other=0)
    is_allowed = ((bits.to(tl.int32) >> (columns % 8)) & 1) != 0
    is_broken = (logit != logit) | (logit == float("inf"))
    logit = tl.where(is_allowed | is_broken, logit, float("-inf"))
    tl.store(out_ptr + row * VOCAB + columns, logit, mask=inside)


def apply_mask_kernel(logits: Tensor, slots: Tensor, masks: Tensor) -> Tensor:
    """`exclusions.apply_mask_reference`, bit for bit; `masks` are `ChoiceTables.masks`."""
    num_rows, vocab = logits.shape
    assert logits.stride(1) == 1 and masks.shape[1] == -(-vocab // 8)
    assert slots.is_contiguous() and masks.is_contiguous()
    out = torch.empty(num_rows, vocab, dtype=torch.float32, device=logits.device)
    _mask_kernel[(num_rows, -(-vocab // _BLOCK))](
        logits,
        slots,
        masks,
        out,
        logits.stride(0),
        VOCAB=vocab,
        MASK_BYTES=masks.shape[1],
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return out
