"""Log-probabilities of prompt tokens, without holding the logits of a whole prompt."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tpcomm.communicator import Communicator
from worker.sampling.alternatives import local_alternatives, merge_alternatives
from worker.sampling.local_best import log_sum_exp, softmax_stats

# 32 rows of a shard of 152,000 ids are 20 MB of logits, and their rank keys twice that.
_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class PromptScores:
    """One row per prompt token, the same bits on every rank."""

    logprobs: Tensor  # float32 [N], of the raw distribution
    top_ids: Tensor  # int32 [N, 20], best first, -1 past the vocabulary
    top_logprobs: Tensor  # float32 [N, 20]


def score_prompt(
    hidden: Tensor,
    targets: Tensor,
    local_logits: Callable[[Tensor], Tensor],
    vocab_start: int,
    comm: Communicator,
) -> PromptScores:
    """Scores `targets` int64 [N], each after the position of its row of `hidden` [N, hidden_size].

    `local_logits` gives this rank's shard of the logits, [n, padded_vocab] of any float dtype.
    Collective; the same N on every rank, at least 1.
    """
    pieces = [
        _score(local_logits(rows).float(), ids, vocab_start, comm)
        for rows, ids in zip(
            torch.split(hidden, _ROWS_AT_ONCE), torch.split(targets, _ROWS_AT_ONCE), strict=True
        )
    ]
    return PromptScores(
        torch.cat([piece.logprobs for piece in pieces]),
        torch.cat([piece.top_ids for piece in pieces]),
        torch.cat([piece.top_logprobs for piece in pieces]),
    )


def _score(logits: Tensor, targets: Tensor, vocab_start: int, comm: Communicator) -> PromptScores:
    local = targets - vocab_start
    inside = (local >= 0) & (local < logits.shape[1])
    own = logits.gather(1, torch.where(inside, local, 0)[:, None])[:, 0]
    own = torch.where(inside, own, -math.inf)
    raw_max, raw_sum, values = comm.all_gather(torch.stack([*softmax_stats(logits), own])).unbind(
        dim=1
    )
    normalizer = log_sum_exp(raw_max, raw_sum)
    keys = comm.all_gather(local_alternatives(logits, vocab_start))
    return PromptScores(values.amax(dim=0) - normalizer, *merge_alternatives(keys, normalizer))
