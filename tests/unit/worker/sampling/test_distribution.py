"""Sampled frequencies against the exact distribution, with fixed seeds: a deterministic test."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.sampling_cases import Row, expected_rows, sample_rows
from worker.sampling import SlotParams

VOCAB_SIZE, NUM_DRAWS = 150, 6000
# Seven standard deviations of a chi-square: with fixed seeds a sound sampler stays far below.
NUM_DEVIATIONS = 7.0


def draw(params: SlotParams, world_size: int, **history: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Counts [vocab] of NUM_DRAWS draws at successive positions, and exact probabilities."""
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 1.5
    rows = [Row(params, position, **history) for position in range(100, 100 + NUM_DRAWS)]
    output = sample_rows(logits.expand(NUM_DRAWS, -1), rows, world_size)[0]
    counts = torch.bincount(output.token_ids, minlength=VOCAB_SIZE).double()
    return counts, expected_rows(logits[None], rows[:1])[0].probs


def deviations(counts: Tensor, probs: Tensor) -> float:
    """How many standard deviations chi-square lies above its mean; rare tokens are pooled."""
    assert counts[probs == 0].sum() == 0
    wanted = probs * counts.sum()
    rare = wanted < 8
    observed = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((wanted[~rare], wanted[rare].sum()[None]))
    used = expected > 0
    statistic = ((observed[used] - expected[used]) ** 2 / expected[used]).sum().item()
    freedom = max(int(used.sum()) - 1, 1)
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


CASES = {
    "temperature": SlotParams(0.7),
    "hot": SlotParams(2.0),
    "top_k": SlotParams(1.0, top_k=10),
    "top_k large": SlotParams(1.0, top_k=80),
    "top_p": SlotParams(1.0, top_p=0.7),
    "min_p": SlotParams(1.0, min_p=0.1),
    "all filters": SlotParams(1.5, top_k=40, top_p=0.8, min_p=0.05),
    "all filters large": SlotParams(1.5, top_k=90, top_p=0.9, min_p=0.02),
    "logit_bias": SlotParams(1.0, logit_bias=((3, 2.5), (13, -1.5), (149, 3.0), (7, -100.0))),
    "logit_bias and filters": SlotParams(
        0.8, top_p=0.8, top_k=30, logit_bias=tuple((i, 1.5) for i in range(0, 150, 2))
    ),
    "bad words": SlotParams(1.3, bad_words=((5,), (90,), (140,))),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_follow_the_filtered_softmax(name: str) -> None:
    counts, probs = draw(replace(CASES[name], seed=0xFEED_0123_4567_89AB), world_size=2)
    assert deviations(counts, probs) < NUM_DEVIATIONS


def test_frequencies_follow_the_penalised_softmax() -> None:
    params = SlotParams(
        1.0, repetition_penalty=1.4, presence_penalty=0.4, frequency_penalty=0.3, seed=77
    )
    history = {"prompt_ids": tuple(range(0, 60, 3)), "output_ids": tuple(range(40, 90)) * 2}
    counts, probs = draw(params, 2, **history)
    assert deviations(counts, probs) < NUM_DEVIATIONS
    without, _ = draw(replace(params, repetition_penalty=1.0), 2, **history)
    assert deviations(without, probs) > NUM_DEVIATIONS


@pytest.mark.parametrize("params", [
    SlotParams(1.2, seed=5), SlotParams(1.0, top_p=0.8, logit_bias=((3, 2.0),), seed=6),
])  # fmt: skip
def test_frequencies_follow_the_softmax_over_what_a_constraint_allows(params: SlotParams) -> None:
    allowed = tuple(range(0, 150, 7))
    counts, probs = draw(params, 2, allowed_ids=allowed)
    assert set(probs.nonzero()[:, 0].tolist()) <= set(allowed)
    assert deviations(counts, probs) < NUM_DEVIATIONS


def test_a_bias_that_is_not_applied_is_caught() -> None:
    counts, _ = draw(SlotParams(1.0, seed=3), 1)
    _, probs = draw(SlotParams(1.0, seed=3, logit_bias=((13, 1.2),)), 1)
    assert deviations(counts, probs) > NUM_DEVIATIONS


def test_a_sampler_that_is_slightly_too_hot_is_caught() -> None:
    counts, _ = draw(SlotParams(1.1, seed=3), 1)
    _, probs = draw(SlotParams(1.0, seed=3), 1)
    assert deviations(counts, probs) > NUM_DEVIATIONS


def test_draws_of_neighbouring_seeds_are_independent() -> None:
    logits = torch.zeros(400, 64)
    first = sample_rows(logits, [Row(SlotParams(1.0, seed=2 * i)) for i in range(400)])[0]
    second = sample_rows(logits, [Row(SlotParams(1.0, seed=2 * i + 1)) for i in range(400)])[0]
    # Equal by chance once in 64: about 6 of 400.
    assert int((first.token_ids == second.token_ids).sum()) < 20
