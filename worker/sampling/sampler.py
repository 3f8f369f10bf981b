"""Choose the next token of every row from logits that are sharded over the vocabulary.

The order is bias and masks -> penalties -> temperature -> min_p -> top_k -> top_p, renormalised
after each, ties at a threshold kept. Every rank computes the winner from the same gathered bytes,
so ranks cannot disagree; a row's token depends neither on the variant nor on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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
from worker.sampling_params import SamplePlan, SampleVariant


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
    """The inputs of one call."""

    logits: Tensor  # [N, V], masked and penalised; float32 unless the plan reads them once
    raw: Tensor  # [N, V], as logits
    slots: Tensor
    positions: Tensor
    tables: SlotSampling
    comm: Communicator
    plan: SamplePlan

    @cached_property
    def rows(self) -> RowParams:
        """Gathered only where it is asked for."""
        return self.tables.rows(self.slots)

    def best(self, bounds: Bounds | None = None) -> BestRecord:
        """This shard's record [N] of the tokens whose scaled logits lie within `bounds`."""
        return local_best(
            self.logits,
            self.raw,
            self.slots,
            self.positions,
            self.tables,
            bounds=bounds,
            all_greedy=self.plan.all_greedy,
            with_stats=self.plan.with_logprobs,
        )

    def gathered_best(self, bounds: Bounds | None = None) -> BestRecord:
        """Every rank's `best`, [world_size, N]. Collective."""
        return BestRecord(self.comm.all_gather(self.best(bounds).packed))


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
    plan: SamplePlan,
) -> SampleOutput:
    """Sample one token for each of N rows. Collective; nothing waits for the device.

    `logits` [N, padded_vocab], of any float dtype, is this rank's shard, padded columns -inf; it
    is not changed. `slots` int64 [N] select parameters; `positions` int64 [N] are those of the
    tokens being sampled. `plan` must be that of `plan_sample` over the rows, or stronger, and the
    same on all ranks; it fixes all shapes and launches. Its `with_penalties` covers the minimum
    length too.
    Alternatives come with logprobs in every variant but LOCAL_BEST.
    """
    step = _begin(logits, slots, positions, tables, comm, plan)
    choice = _CHOOSERS[plan.variant](step)
    token_ids = torch.where(choice.finite, choice.token_ids, 0)
    if not plan.with_logprobs:
        return SampleOutput(token_ids, choice.finite, None, None, None)
    normalizer = log_normalizer(choice.records)
    logprobs = choice.raw - normalizer
    if plan.variant == SampleVariant.LOCAL_BEST:
        return SampleOutput(token_ids, choice.finite, logprobs, None, None)
    keys = comm.all_gather(local_alternatives(step.raw, tables.vocab_start))
    top_ids, top_logprobs = merge_alternatives(keys, normalizer)
    return SampleOutput(token_ids, choice.finite, logprobs, top_ids, top_logprobs)


def best_records(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    tables: SlotSampling,
    comm: Communicator,
    plan: SamplePlan,
) -> BestRecord:
    """Every rank's record [world_size, N], the best of which is the sampled token.

    For plans of LOCAL_BEST without logprobs; otherwise as `sample`. Collective.
    """
    assert plan.variant is SampleVariant.LOCAL_BEST and not plan.with_logprobs
    return _begin(logits, slots, positions, tables, comm, plan).gathered_best()


def _begin(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    tables: SlotSampling,
    comm: Communicator,
    plan: SamplePlan,
) -> _Step:
    """Bias, masks and penalties are on the logits."""
    assert logits.shape[1] == tables.counts.shape[1]
    if not (logits.is_cuda and plan.reads_logits_once):
        logits = logits.float()
    altered = restrict(
        logits, slots, tables.choices, plan.with_bias, plan.with_bad_words, plan.with_mask
    )
    if plan.with_penalties:
        altered = apply_penalties(altered, slots, positions, tables)
    return _Step(altered, logits, slots, positions, tables, comm, plan)


def _choose_local_best(step: _Step) -> _Choice:
    records = step.gathered_best()
    return _choose_record(records, records.value.amax(dim=0).isfinite())


def _choose_threshold(step: _Step) -> _Choice:
    plan = step.plan
    scaled = scale_logits(step.logits, step.rows, plan.all_greedy)
    overall_max = threshold.overall_maximum(scaled, step.comm)
    kept = threshold.kept_from(
        scaled,
        step.rows,
        overall_max,
        step.comm,
        plan.with_top_k and not plan.all_greedy,
        plan.with_top_p and not plan.all_greedy,
    )
    bounds = Bounds(low=kept, high=torch.full_like(kept, torch.inf))
    records = step.gathered_best(bounds)
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
    scaled = scale_logits(step.logits, step.rows, step.plan.all_greedy)
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
        step.plan.all_greedy,
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
