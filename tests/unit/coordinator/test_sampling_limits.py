"""Limits of the API: as ranges say them, and as the ranks have them."""

import math

import pytest

from coordinator import sampling_limits
from coordinator.errors import BadRequest
from coordinator.sampling_limits import BIAS_RANGE, SAMPLING_RANGES, Range
from worker import sampling_params
from worker.sampling_params import SlotParams


def test_a_range_holds_its_ends_unless_it_is_open_and_never_nan() -> None:
    assert 0 in Range(0, 1) and 1 in Range(0, 1)
    assert 0 not in Range(0, 1, is_open=True) and 1 in Range(0, 1, is_open=True)
    for value in (-1e-9, 1 + 1e-9, math.nan, math.inf):
        assert value not in Range(0, 1)
        with pytest.raises(BadRequest, match="^top_p is .* at least 0 and at most 1$"):
            Range(0, 1).check("top_p", value)


def test_counts_are_those_that_the_ranks_have_room_for() -> None:
    assert sampling_limits.MAX_STOP_IDS == sampling_params.MAX_STOP_IDS
    assert sampling_limits.MAX_LOGPROBS == sampling_params.MAX_ALTERNATIVES
    assert sampling_limits.MAX_BIASED_IDS == sampling_params.MAX_BIASED_IDS
    assert sampling_limits.MAX_BAD_WORD_SEQUENCES == sampling_params.MAX_BAD_WORDS
    assert sampling_limits.MAX_BAD_WORD_IDS == sampling_params.MAX_BAD_WORD_IDS


@pytest.mark.parametrize("field", SAMPLING_RANGES)
def test_the_ranks_take_the_ends_of_every_range(field: str) -> None:
    limits = SAMPLING_RANGES[field]
    kind = int if field == "top_k" else float
    for value in (limits.low, limits.high):
        assert SlotParams(**{field: kind(value)})  # type: ignore[arg-type]


def test_the_ranks_take_the_ends_of_biases() -> None:
    assert SlotParams(logit_bias=((1, BIAS_RANGE.low), (2, BIAS_RANGE.high)))
