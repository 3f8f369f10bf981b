"""One record per row and rank: the shard's best token, and what logprobs need of the shard.

By the Gumbel-max trick the argmax of logit / temperature + Gumbel noise is a sample of the
softmax (Gumbel 1954; Maddison, Tarlow, Minka 2014), and the maximum over shards of the shards'
maxima is the maximum over the vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worker.sampling.gumbel_kernel import gumbel_argmax
from worker.sampling.philox import gumbel_range_reference
from worker.sampling.record import RECORD_WORDS, BestRecord, Bounds
from worker.sampling.tables import RowParams, SlotSampling


def scale_logits(logits: Tensor, rows: RowParams, all_greedy: bool) -> Tensor:
    """float32 [N, V]: logits times the inverse temperature (greedy rows: times 1)."""
    return logits if all_greedy else logits * rows.inv_temperature[:, None]


def best_reference(
    scaled: Tensor,
    raw: Tensor,
    rows: RowParams,
    positions: Tensor,
    vocab_start: int,
    bounds: Bounds | None,
    all_greedy: bool,
    with_stats: bool,
) -> BestRecord:
    """The record [N] of `scaled` float32 [N, V]; a NaN among unbounded logits is the value."""
    perturbed = scaled if all_greedy else _perturb(scaled, rows, positions, vocab_start)
    if bounds is not None:
        competes = (scaled >= bounds.low[:, None]) & (scaled <= bounds.high[:, None])
        perturbed = torch.where(competes, perturbed, -math.inf)
    column = perturbed.argmax(dim=1, keepdim=True)
    packed = torch.zeros(scaled.shape[0], RECORD_WORDS, dtype=torch.int32, device=scaled.device)
    record = BestRecord(packed)
    record.value.copy_(perturbed.gather(1, column)[:, 0])
    record.token_id.copy_(column[:, 0] + vocab_start)
    record.raw.copy_(raw.gather(1, column)[:, 0])
    if with_stats:
        raw_max, raw_sum = softmax_stats(raw)
        record.raw_max.copy_(raw_max)
        record.raw_sum.copy_(raw_sum)
    return record


def _perturb(scaled: Tensor, rows: RowParams, positions: Tensor, vocab_start: int) -> Tensor:
    """`scaled` plus noise in the rows that are not greedy; no work for those that are."""
    sampled = (rows.temperature > 0).nonzero()[:, 0]
    noise = gumbel_range_reference(
        rows.seed[sampled], positions[sampled], vocab_start, scaled.shape[1]
    )
    if sampled.shape[0] == scaled.shape[0]:
        return noise.add_(scaled)
    return scaled.index_add(0, sampled, noise)


def softmax_stats(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and sum of exp(raw - maximum) of each row; the sum is 0 where all are -inf."""
    raw_max = raw.amax(dim=1)
    shift = torch.where(raw_max == -math.inf, 0.0, raw_max)
    return raw_max, (raw - shift[:, None]).exp_().sum(dim=1)


def local_best(
    logits: Tensor,
    raw: Tensor,
    slots: Tensor,
    positions: Tensor,
    tables: SlotSampling,
    *,
    bounds: Bounds | None = None,
    all_greedy: bool = False,
    with_stats: bool = False,
) -> BestRecord:
    """The record [N] of this shard's `logits` float32 [N, V] (masked, penalised, not scaled); on
    CUDA of any float dtype.

    `raw` is the same before masks and penalties. With `bounds` only tokens whose scaled logit
    lies within them compete. On CUDA two kernels, which read the parameters of `slots`
    themselves and treat NaN as +inf; elsewhere the reference.
    """
    if logits.is_cuda:
        packed = gumbel_argmax(
            logits, raw, slots, positions, tables, bounds, all_greedy, with_stats
        )
        return BestRecord(packed)
    rows = tables.rows(slots)
    scaled = scale_logits(logits, rows, all_greedy)
    return best_reference(
        scaled, raw, rows, positions, tables.vocab_start, bounds, all_greedy, with_stats
    )


def winning_rank(best: BestRecord) -> Tensor:
    """int64 [1, N]: the rank whose record wins, given records [world_size, N].

    Equal values go to the lowest rank, which holds the lowest ids.
    """
    return best.value.argmax(dim=0, keepdim=True)


def log_normalizer(best: BestRecord) -> Tensor:
    """float32 [N]: log of the sum of exp(raw) over the full vocabulary, from gathered records."""
    return log_sum_exp(best.raw_max, best.raw_sum)


def log_sum_exp(raw_max: Tensor, raw_sum: Tensor) -> Tensor:
    """float32 [N] from the `softmax_stats` of all shards, [world_size, N] each."""
    overall = raw_max.amax(dim=0)
    shift = torch.where(raw_max == -math.inf, -math.inf, raw_max - overall)
    return overall + (raw_sum * shift.exp()).sum(dim=0).log()
