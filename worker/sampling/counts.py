"""Which tokens of this rank's vocabulary shard occur in each slot's prompt and output."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.sampling.tables import PROMPT_BIT, SlotSampling


def mark_prompt(tables: SlotSampling, slot: int, token_ids: Tensor) -> None:
    """Note prompt tokens `token_ids` int64 [n] (table's device) of `slot`.

    Needed only where `SlotParams.counts_tokens`; eager, as prefill chunks have any length.
    """
    local, inside = _local_ids(tables, token_ids)
    padded_vocab = tables.counts.shape[1]
    # One column more, for ids of other shards. Repeated ids write one and the same value.
    flags = torch.zeros(padded_vocab + 1, dtype=torch.int32, device=token_ids.device)
    flags[torch.where(inside, local, padded_vocab)] = PROMPT_BIT
    tables.counts[slot].bitwise_or_(flags[:padded_vocab])


def add_outputs(tables: SlotSampling, slot: int, token_ids: Tensor) -> None:
    """Count output tokens `token_ids` int64 [n] that are prefilled again after a preemption."""
    slots = torch.full_like(token_ids, slot)
    update_counts(tables, slots, token_ids, torch.ones_like(token_ids, dtype=torch.bool))


def mark_chunk(
    tables: SlotSampling, slot: int, token_ids: Tensor, start: int, prompt_len: int
) -> None:
    """Note a prefill chunk whose first token is at position `start`: prompt, then outputs."""
    num_prompt = max(0, min(prompt_len - start, token_ids.shape[0]))
    if num_prompt > 0:
        mark_prompt(tables, slot, token_ids[:num_prompt])
    if num_prompt < token_ids.shape[0]:
        add_outputs(tables, slot, token_ids[num_prompt:])


def update_counts(tables: SlotSampling, slots: Tensor, token_ids: Tensor, active: Tensor) -> None:
    """Count one sampled token per row: slots, token_ids int64 [N], active bool [N].

    Rows that are not active, or whose token is another rank's, add nothing. Slots may repeat.
    """
    local, inside = _local_ids(tables, token_ids)
    counts = tables.counts
    index = slots * counts.shape[1] + local
    # Integer addition: the same result in any order.
    counts.view(-1).scatter_add_(0, index, (inside & active).to(torch.int32))


def _local_ids(tables: SlotSampling, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Column of each id in this shard (0 where it has none), and whether it has one."""
    local = token_ids - tables.vocab_start
    inside = (local >= 0) & (local < tables.counts.shape[1])
    return torch.where(inside, local, 0), inside
