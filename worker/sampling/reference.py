"""Sampling the obvious way: all logits in one place, one row at a time, in float64.

What the distributed variants are compared with; only the noise is shared with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpcomm.communicator import Communicator
from worker.sampling.philox import gumbel_range_reference
from worker.sampling_params import MIN_TEMPERATURE, SlotParams


@dataclass(frozen=True)
class ReferenceSample:
    token_id: int
    finite: bool
    probs: Tensor  # float64 [vocab_size], what the token is drawn from; one-hot when greedy
    raw_logprobs: Tensor  # float64 [vocab_size]


def gather_logits(logits: Tensor, vocab_start: int, comm: Communicator) -> Tensor:
    """float32 [N, vocab_size or more] from every rank's shard [N, padded_vocab]. Collective.

    Columns that no shard really holds are -inf.
    """
    shards = comm.all_gather(logits.contiguous())
    starts = comm.all_gather(torch.tensor([vocab_start], device=logits.device)).flatten().tolist()
    width = max(starts) + logits.shape[1]
    full = torch.full((logits.shape[0], width), -math.inf, device=logits.device)
    for start, shard in zip(starts, shards, strict=True):
        # A shard's padding overlaps the next shard's first columns.
        part = full[:, start : start + logits.shape[1]]
        part.copy_(torch.maximum(part, shard))
    return full


def sample_reference(
    logits: Tensor,
    params: SlotParams,
    position: int,
    prompt_ids: Sequence[int] = (),
    output_ids: Sequence[int] = (),
    allowed_ids: Sequence[int] | None = None,
) -> ReferenceSample:
    """Sample one token from one row of `logits` float32 [vocab_size]; None allows all ids."""
    raw_logprobs = torch.log_softmax(logits.double(), dim=0)
    restricted = _restrict(logits, params, output_ids, allowed_ids)
    altered = _penalise(restricted, params, position, prompt_ids, output_ids)
    if not math.isfinite(altered.max().item()):
        nothing = torch.zeros_like(raw_logprobs)
        return ReferenceSample(0, False, nothing, raw_logprobs)
    if params.is_greedy:
        token_id = int((altered == altered.max()).nonzero()[0, 0])
        one_hot = torch.zeros_like(raw_logprobs)
        one_hot[token_id] = 1.0
        return ReferenceSample(token_id, True, one_hot, raw_logprobs)
    temperature = max(params.temperature, MIN_TEMPERATURE)
    scaled = altered * torch.tensor(1.0 / temperature, dtype=torch.float32)
    kept = _filter(scaled, params)
    seed = torch.tensor([params.seed - (1 << 64) * (params.seed >> 63)])
    noise = gumbel_range_reference(seed, torch.tensor([position]), 0, logits.shape[0])[0]
    token_id = int(torch.where(kept, scaled + noise, -math.inf).argmax())
    probs = torch.softmax(torch.where(kept, scaled.double(), -math.inf), dim=0)
    return ReferenceSample(token_id, True, probs, raw_logprobs)


def _restrict(
    logits: Tensor,
    params: SlotParams,
    output_ids: Sequence[int],
    allowed_ids: Sequence[int] | None,
) -> Tensor:
    altered = logits.clone()
    for token_id, value in params.logit_bias:
        altered[token_id] += value
    for word in params.bad_words:
        if list(word[:-1]) == list(output_ids)[len(output_ids) - len(word) + 1 :]:
            altered[word[-1]] = -math.inf
    if allowed_ids is not None:
        mask = torch.full_like(altered, -math.inf)
        mask[list(allowed_ids)] = 0.0
        altered += mask
    return altered


def _penalise(
    logits: Tensor,
    params: SlotParams,
    position: int,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
) -> Tensor:
    altered = logits.clone()
    if position - params.prompt_len < params.min_tokens:
        altered[list(params.stop_ids)] = -math.inf
    repetition = torch.tensor(params.repetition_penalty, dtype=torch.float32)
    for token_id in {*prompt_ids, *output_ids}:
        value = altered[token_id]
        altered[token_id] = value / repetition if value > 0 else value * repetition
    for token_id in set(output_ids):
        count = list(output_ids).count(token_id)
        altered[token_id] -= torch.tensor(params.frequency_penalty, dtype=torch.float32) * count
        altered[token_id] -= params.presence_penalty
    return altered


def _filter(scaled: Tensor, params: SlotParams) -> Tensor:
    """bool [vocab_size]: what min_p, top_k and top_p keep, in that order."""
    probs = torch.softmax(scaled.double(), dim=0)
    kept = (probs >= params.min_p * probs.max()) & (scaled > -math.inf)
    if params.top_k > 0:
        best_first = scaled[kept].sort(descending=True).values
        kept &= scaled >= best_first[min(params.top_k, best_first.shape[0]) - 1]
    if params.top_p < 1.0:
        order = torch.where(kept, scaled, -math.inf).sort(descending=True, stable=True)
        reached = torch.softmax(order.values.double(), dim=0).cumsum(dim=0)
        last = int((reached < params.top_p).sum().clamp(max=int(kept.sum()) - 1))
        kept &= scaled >= order.values[last]
    return kept
