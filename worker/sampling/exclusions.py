"""What a row may choose, before penalties: biases, bad words, the mask of a constraint."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worker.sampling.choice_tables import ANY_ID, ChoiceTables
from worker.sampling.mask_kernel import apply_mask_kernel


def restrict(
    logits: Tensor,
    slots: Tensor,
    tables: ChoiceTables,
    with_bias: bool,
    with_bad_words: bool,
    with_mask: bool,
) -> Tensor:
    """`logits` float32 [N, padded_vocab] of `slots` int64 [N] with what the flags name applied.

    A new tensor, or `logits` itself when no flag is set.
    """
    if with_bias:
        logits = add_bias(logits, slots, tables)
    if with_bad_words:
        logits = ban_words(logits, slots, tables)
    if with_mask:
        logits = apply_mask(logits, slots, tables)
    return logits


def add_bias(logits: Tensor, slots: Tensor, tables: ChoiceTables) -> Tensor:
    """A copy of `logits` with the rows' biases added."""
    local, inside = _columns(tables.bias_ids.index_select(0, slots), logits, tables)
    values = torch.where(inside, tables.bias_values.index_select(0, slots), 0.0)
    # A row's ids differ and the others add zero to column 0: the same result in any order.
    return logits.scatter_add(1, local, values)


def ban_words(logits: Tensor, slots: Tensor, tables: ChoiceTables) -> Tensor:
    """A copy of `logits` with the last id of every bad word that has begun at -inf."""
    prefixes = tables.prefixes.index_select(0, slots)
    recent = tables.recent.index_select(0, slots)[:, None, :]
    has_begun = ((prefixes == recent) | (prefixes == ANY_ID)).all(dim=2)
    local, inside = _columns(tables.last_ids.index_select(0, slots), logits, tables)
    is_banned = inside & has_begun
    # +inf changes nothing under amin, so the others may all point at column 0.
    values = torch.where(is_banned, -math.inf, math.inf)
    return logits.scatter_reduce(1, torch.where(is_banned, local, 0), values, "amin")


def note_outputs(tables: ChoiceTables, slots: Tensor, token_ids: Tensor, emits: Tensor) -> None:
    """Remembers one sampled token per row where `emits` bool [N]; token_ids int64 [N].

    Padding rows all write the dummy slot, and all write what it has.
    """
    before = tables.recent.index_select(0, slots)
    after = torch.cat([before[:, 1:], token_ids[:, None].int()], dim=1)
    tables.recent[slots] = torch.where(emits[:, None], after, before)


def apply_mask_reference(logits: Tensor, slots: Tensor, tables: ChoiceTables) -> Tensor:
    """A copy of `logits` with what the slots' masks do not allow at -inf.

    NaN and +inf stay: they tell of a broken row, whatever is allowed.
    """
    masks = tables.masks.index_select(0, slots)
    places = torch.arange(8, dtype=torch.uint8, device=logits.device)
    bits = (masks[:, :, None] >> places) & 1
    is_allowed = bits.flatten(1)[:, : logits.shape[1]] != 0
    return torch.where(is_allowed | ~(logits < math.inf), logits, -math.inf)


def apply_mask(logits: Tensor, slots: Tensor, tables: ChoiceTables) -> Tensor:
    """`apply_mask_reference`, as one kernel on CUDA."""
    if logits.is_cuda:
        return apply_mask_kernel(logits, slots, tables.masks)
    return apply_mask_reference(logits, slots, tables)


def _columns(ids: Tensor, logits: Tensor, tables: ChoiceTables) -> tuple[Tensor, Tensor]:
    """Column of each id in this shard (0 where it has none), and whether it has one."""
    local = ids.to(torch.int64) - tables.vocab_start
    # Unused places hold -1, which may be a column of a later shard.
    inside = (ids >= 0) & (local >= 0) & (local < logits.shape[1])
    return torch.where(inside, local, 0), inside
