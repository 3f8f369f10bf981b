"""Choose the next token of every row from logits that are sharded over the vocabulary.

The order is bias and masks -> penalties -> temperature -> min_p -> top_k -> top_p, renormalised
after each, ties at a threshold kept. Every rank computes the winner from the same gathered bytes,
so ranks cannot disagree; a row's token depends neither on the variant nor on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpcomm.communicator import Communicator
from worker.sampling import candidates, threshold
from worker.sampling.alternatives import local_alternatives, merge_alternatives
from worker.sampling.exclusions import restrict
from worker.sampling.local_best import local_best, log_normalizer, scale_logits, winning_rank
from worker.sampling.penalties import apply_penalties
from worker.sampling.record import BestRecord, Bounds
from worker.sampling.tables import RowParams, SlotSampling
from worker.sampling_params import SampleVariant


@dataclass(frozen=True)
class SampleOutput:
    """One row per sequence, the same bits on every rank."""

    token_ids: Tensor  # int64 [N]; 0 where not finite
    finite: Tensor  # bool [N]; False: NaN or +inf among the logits, or no token left to choose
    logprobs: Tensor | None  # float32 [N], of the raw distribution
    top_ids: Tensor | None  # int32 [N, 20], best first, -1 past the vocabulary
    top_logprobs: Tensor | None  # float32 [N, 20]


@dataclass(frozen=True)
class _Step:
    """The inputs of one call, and what its flags leave out."""

    logits: Tensor  # float32 [N, V], masked and penalised
    raw: Tensor  # float32 [N, V]
    slots: Tensor
    positions: Tensor
    tables: SlotSampling
    rows: RowParams
    comm: Communicator
    all_greedy: bool
    with_logprobs: bool
    with_top_k: bool
    with_top_p: bool

    def best(self, bounds: Bounds | None = None) -> BestRecord:
        """This shard's record [N] of the tokens whose scaled logits lie within `bounds`."""
        return local_best(
            self.logits,
            self.raw,
            self.slots,
            self.positions,
            self.tables,
            self.rows,
            bounds=bounds,
            all_greedy=self.all_greedy,
            with_stats=self.with_logprobs,
        )


@dataclass(frozen=True)
class _Choice:
    token_ids: Tensor  # int64 [N]
    raw: Tensor  # float32 [N], raw logit of the token
    finite: Tensor  # bool [N]
    records: BestRecord  # gathered [world_size, N]


def sample(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    tables: SlotSampling,
    comm: Communicator,
    vocab_start: int,
    variant: SampleVariant,
    with_penalties: bool,
    with_logprobs: bool,
    *,
    all_greedy: bool = False,
    with_top_k: bool = True,
    with_top_p: bool = True,
    with_bias: bool = False,
    with_bad_words: bool = False,
    with_mask: bool = False,
) -> SampleOutput:
    """Sample one token for each of N rows. Collective; nothing waits for the device.

    `logits` float32 [N, padded_vocab] is this rank's shard, padded columns -inf; it is not
    changed. `slots` int64 [N] select parameters; `positions` int64 [N] are those of the tokens
    being sampled. Variant and flags must be those of `plan_sample` over the rows, or stronger,
    and the same on all ranks; they fix all shapes and launches. `with_penalties` covers the
    minimum length too. Alternatives come with logprobs in every variant but LOCAL_BEST.
    """
    assert vocab_start == tables.vocab_start, (vocab_start, tables.vocab_start)
    assert logits.dtype == torch.float32 and logits.shape[1] == tables.counts.shape[1]
    altered = restrict(logits, slots, tables.choices, with_bias, with_bad_words, with_mask)
    if with_penalties:
        altered = apply_penalties(altered, slots, positions, tables)
    step = _Step(
        logits=altered,
        raw=logits,
        slots=slots,
        positions=positions,
        tables=tables,
        rows=tables.rows(slots),
        comm=comm,
        all_greedy=all_greedy,
        with_logprobs=with_logprobs,
        with_top_k=with_top_k and not all_greedy,
        with_top_p=with_top_p and not all_greedy,
    )
    choose = _CHOOSERS[variant]
    choice = choose(step)
    token_ids = torch.where(choice.finite, choice.token_ids, 0)
    if not with_logprobs:
        return SampleOutput(token_ids, choice.finite, None, None, None)
    normalizer = log_normalizer(choice.records)
    logprobs = choice.raw - normalizer
    if variant == SampleVariant.LOCAL_BEST:
        return SampleOutput(token_ids, choice.finite, logprobs, None, None)
    keys = comm.all_gather(local_alternatives(logits, vocab_start))
    top_ids, top_logprobs = merge_alternatives(keys, normalizer)
    return SampleOutput(token_ids, choice.finite, logprobs, top_ids, top_logprobs)


def _choose_local_best(step: _Step) -> _Choice:
    records = BestRecord(step.comm.all_gather(step.best().packed))
    return _choose_record(records, records.value.amax(dim=0).isfinite())


def _choose_threshold(step: _Step) -> _Choice:
    scaled = scale_logits(step.logits, step.rows, step.all_greedy)
    overall_max = threshold.overall_maximum(scaled, step.comm)
    kept = threshold.kept_from(
        scaled, step.rows, overall_max, step.comm, step.with_top_k, step.with_top_p
    )
    bounds = Bounds(low=kept, high=torch.full_like(kept, torch.inf))
    records = BestRecord(step.comm.all_gather(step.best(bounds).packed))
    return _choose_record(records, overall_max.isfinite())


def _choose_record(records: BestRecord, finite: Tensor) -> _Choice:
    winner = winning_rank(records)
    return _Choice(
        token_ids=records.token_id.gather(0, winner)[0].to(torch.int64),
        raw=records.raw.gather(0, winner)[0],
        finite=finite,
        records=records,
    )


def _choose_candidate(step: _Step) -> _Choice:
    scaled = scale_logits(step.logits, step.rows, step.all_greedy)
    top = candidates.local_top(scaled)
    wide = step.best(candidates.wide_bounds(top[0][:, -1], step.rows))
    local = candidates.make_candidates(
        scaled,
        step.raw,
        top,
        wide,
        step.rows,
        step.positions,
        step.tables.vocab_start,
        step.all_greedy,
    )
    gathered = candidates.Candidates.unpack(step.comm.all_gather(local.pack()))
    overall_max = gathered.values[:, :, 0].amax(dim=0)
    kept = candidates.kept_from(gathered, step.rows, overall_max)
    token_ids, raw = candidates.choose_candidate(gathered, kept)
    return _Choice(token_ids, raw, overall_max.isfinite(), gathered.wide)


_CHOOSERS = {
    SampleVariant.LOCAL_BEST: _choose_local_best,
    SampleVariant.TOP_CANDIDATES: _choose_candidate,
    SampleVariant.THRESHOLD: _choose_threshold,
}
