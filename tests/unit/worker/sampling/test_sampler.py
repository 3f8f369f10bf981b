"""Distributed sampling against the obvious way, row by row and rank by rank."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.sampling_cases import (
    Row,
    expected_rows,
    make_shard,
    random_rows,
    sample_rows,
    sample_shard,
    strongest_plan,
    token_ids,
)
from tests.helpers.thread_comm import ThreadCommunicator, run_ranks
from worker.sampling import SamplePlan, SampleVariant, SlotParams
from worker.sampling.reference import gather_logits

WORLD_SIZES = [1, 2, 3, 4]
# Divisible by 64, odd, one partial granule a rank, fewer columns than candidates.
VOCAB_SIZES = [512, 1543, 257, 40]


def make_logits(num_rows: int, vocab_size: int, seed: int, step: float = 0.0) -> Tensor:
    """Normal logits of deviation 3; `step` rounds them to multiples, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 3
    return (logits / step).round() * step if step else logits


def world_sizes_for(vocab_size: int) -> list[int]:
    return [size for size in WORLD_SIZES if size <= -(-vocab_size // 64)]


@pytest.mark.parametrize("step", [0.0, 1.0], ids=["distinct", "tied"])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("variant", SampleVariant)
def test_every_variant_and_tp_degree_gives_the_reference_s_tokens(
    variant: SampleVariant, vocab_size: int, step: float
) -> None:
    rows = random_rows(24, vocab_size, variant, seed=vocab_size)
    logits = make_logits(len(rows), vocab_size, vocab_size, step)
    expected = expected_rows(logits, rows)
    for world_size in world_sizes_for(vocab_size):
        outputs = sample_rows(logits, rows, world_size)
        for output in outputs:
            assert token_ids(output) == [row.token_id for row in expected], world_size
            assert output.finite.all()
        logprobs = [output.logprobs for output in outputs if output.logprobs is not None]
        assert len(logprobs) == world_size
        assert all(torch.equal(others, logprobs[0]) for others in logprobs)
        wanted = [row.raw_logprobs[row.token_id].item() for row in expected]
        assert logprobs[0].tolist() == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("variant", SampleVariant)
def test_a_row_s_token_does_not_depend_on_the_variant_its_neighbours_need(
    variant: SampleVariant, world_size: int
) -> None:
    rows = random_rows(40, 700, variant, seed=5)
    logits = make_logits(len(rows), 700, 5, step=0.25)
    alone = [
        token_ids(sample_rows(logits[i : i + 1], [row], world_size)[0])[0]
        for i, row in enumerate(rows)
    ]
    for stronger in SampleVariant:
        if stronger >= variant:
            together = sample_rows(logits, rows, world_size, strongest_plan(stronger))
            assert token_ids(together[0]) == alone, stronger


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_flat_nucleus_of_more_than_a_thousand_tokens_is_exact(world_size: int) -> None:
    params = SlotParams(temperature=2.0, top_p=0.9)
    rows = [Row(replace(params, seed=seed), position=seed * 3) for seed in range(16)]
    logits = make_logits(16, 4999, 3) * 0.3
    expected = expected_rows(logits, rows)
    assert all(int((row.probs > 0).sum()) > 1000 for row in expected)
    for output in sample_rows(logits, rows, world_size):
        assert token_ids(output) == [row.token_id for row in expected]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_alternatives_are_the_raw_distribution_s_best_in_every_variant_that_has_them(
    world_size: int,
) -> None:
    params = SlotParams(temperature=0.7, num_logprobs=20, frequency_penalty=2.0)
    rows = [Row(params, output_ids=tuple(range(0, 300, 2)))] * 3
    logits = make_logits(3, 300, 8, step=0.5)
    raw = torch.log_softmax(logits.double(), dim=1)
    best = raw.sort(dim=1, descending=True, stable=True)
    for variant in (SampleVariant.TOP_CANDIDATES, SampleVariant.THRESHOLD):
        output = sample_rows(logits, rows, world_size, strongest_plan(variant, True))[0]
        assert output.top_ids is not None and output.top_logprobs is not None
        assert torch.equal(output.top_ids.long(), best.indices[:, :20])
        torch.testing.assert_close(
            output.top_logprobs.double(), best.values[:, :20], atol=2e-5, rtol=0
        )


def test_without_logprobs_none_are_made() -> None:
    plan = strongest_plan(SampleVariant.THRESHOLD)
    output = sample_rows(make_logits(1, 100, 0), [Row(SlotParams())], 1, plan)[0]
    assert (output.logprobs, output.top_ids, output.top_logprobs) == (None, None, None)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("variant", SampleVariant)
def test_equal_maxima_go_to_the_lowest_id_when_greedy(
    variant: SampleVariant, world_size: int
) -> None:
    logits = torch.zeros(4, 640)
    logits[1, [70, 100, 300, 639]] = 2.0
    logits[2, 500:] = 1.0
    logits[3] = -3.0
    logits[3, [0, 639]] = -math.inf
    rows = [Row(SlotParams())] * 4
    output = sample_rows(logits, rows, world_size, strongest_plan(variant))[0]
    assert token_ids(output) == [0, 70, 500, 1]


@pytest.mark.parametrize("params", [
    SlotParams(1.0, top_k=1), SlotParams(1.0, min_p=1.0), SlotParams(1.0, top_p=1e-30),
    SlotParams(1.0, top_p=0.0), SlotParams(1e-9), SlotParams(1.0, top_k=64, top_p=0.0),
])  # fmt: skip
def test_filters_that_leave_one_token_make_a_row_greedy(params: SlotParams) -> None:
    logits = make_logits(30, 700, 21)
    rows = [Row(replace(params, seed=seed)) for seed in range(30)]
    for world_size in (1, 2):
        assert token_ids(sample_rows(logits, rows, world_size)[0]) == logits.argmax(1).tolist()


@pytest.mark.parametrize("params", [SlotParams(1.0, top_k=1), SlotParams(1.0, min_p=1.0)])
@pytest.mark.parametrize("world_size", [1, 3])
def test_more_ties_at_a_threshold_than_candidates_are_all_kept(
    params: SlotParams, world_size: int
) -> None:
    logits = torch.zeros(400, 640)
    logits[:, 100:500] = 4.0
    rows = [Row(replace(params, seed=seed)) for seed in range(400)]
    tokens = token_ids(sample_rows(logits, rows, world_size)[0])
    assert tokens == [row.token_id for row in expected_rows(logits, rows)]
    assert min(tokens) >= 100 and max(tokens) < 500 and len(set(tokens)) > 200


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("variant", SampleVariant)
def test_broken_row_is_reported_on_every_rank_and_harms_no_other(
    variant: SampleVariant, world_size: int
) -> None:
    rows = random_rows(8, 650, variant, seed=9)
    logits = make_logits(8, 650, 9)
    clean = token_ids(sample_rows(logits, rows)[0])
    logits[1, 3] = math.nan
    logits[2, 649] = math.nan
    logits[3] = math.nan
    logits[4, 300] = math.inf
    logits[5] = -math.inf
    plan = strongest_plan(variant, with_logprobs=True)
    for output in sample_rows(logits, rows, world_size, plan):
        assert output.finite.tolist() == [True] + [False] * 5 + [True] * 2
        assert token_ids(output) == [clean[0], 0, 0, 0, 0, 0, clean[6], clean[7]]


@pytest.mark.parametrize("variant", SampleVariant)
def test_masked_logits_are_never_sampled(variant: SampleVariant) -> None:
    logits = torch.full((200, 320), -math.inf)
    logits[:, [5, 130, 319]] = torch.tensor([1.0, 1.1, 0.9])
    rows = [Row(SlotParams(temperature=5.0, seed=seed)) for seed in range(200)]
    for world_size in (1, 3):
        output = sample_rows(logits, rows, world_size, strongest_plan(variant))[0]
        assert set(token_ids(output)) == {5, 130, 319}


def test_plan_flags_leave_out_only_work_that_changes_nothing() -> None:
    greedy = [Row(SlotParams(top_p=0.5, top_k=100), position=i) for i in range(10)]
    nucleus = [Row(SlotParams(1.0, top_p=0.8, seed=i)) for i in range(10)]
    large_k = [Row(SlotParams(1.0, top_k=99, seed=i)) for i in range(10)]
    logits = make_logits(10, 500, 2)
    everything = strongest_plan(SampleVariant.THRESHOLD)
    for rows in (greedy, nucleus, large_k):
        lean = token_ids(sample_rows(logits, rows, 2)[0])
        assert lean == token_ids(sample_rows(logits, rows, 2, everything)[0])


def test_logits_are_left_alone() -> None:
    rows = random_rows(6, 300, SampleVariant.THRESHOLD, seed=3)
    logits = make_logits(6, 300, 3)
    before = logits.clone()
    sample_rows(logits, rows, 1, strongest_plan(SampleVariant.THRESHOLD, True))
    assert torch.equal(logits, before)


def test_one_gather_of_twenty_bytes_a_row_serves_greedy_and_temperature() -> None:
    def one_rank(comm: ThreadCommunicator) -> tuple[int, int, int]:
        rows = [Row(SlotParams(1.0))] * 5
        local, tables = make_shard(make_logits(5, 300, 1), rows, comm.rank, 2)
        slots = torch.tensor([5, 4, 3, 2, 1])
        sample_shard(local, tables, slots, slots, SamplePlan(), comm)
        gathers = comm.stats.all_gather
        return gathers.calls, gathers.bytes, comm.stats.all_reduce.calls

    assert run_ranks(2, one_rank) == [(1, 100, 0)] * 2


def test_gathered_logits_are_those_of_the_full_vocabulary() -> None:
    logits = make_logits(3, 1000, 4)
    rows = [Row(SlotParams())] * 3

    def one_rank(comm: ThreadCommunicator) -> Tensor:
        local, tables = make_shard(logits, rows, comm.rank, 3)
        return gather_logits(local, tables.vocab_start, comm)

    for full in run_ranks(3, one_rank):
        assert torch.equal(full[:, :1000], logits)
        assert (full[:, 1000:] == -math.inf).all()
