from __future__ import annotations

import math
from typing import Any

import pytest

from worker.sampling_params import SamplePlan, SampleVariant, SlotParams, plan_sample

BEST, CANDIDATES, THRESHOLD = SampleVariant


@pytest.mark.parametrize(
    ("changes", "variant"),
    [
        ({}, BEST),
        ({"temperature": 0.7}, BEST),
        ({"temperature": 0.7, "top_k": 1}, CANDIDATES),
        ({"temperature": 0.7, "top_k": 64, "top_p": 0.9, "min_p": 0.1}, CANDIDATES),
        ({"temperature": 0.7, "top_k": 65}, THRESHOLD),
        ({"temperature": 0.7, "top_p": 0.9}, THRESHOLD),
        ({"temperature": 0.7, "min_p": 0.1}, THRESHOLD),
        ({"top_p": 0.9, "top_k": 900}, BEST),
        ({"num_logprobs": 0}, BEST),
        ({"num_logprobs": 1}, CANDIDATES),
        ({"temperature": 0.7, "top_p": 0.9, "num_logprobs": 20}, THRESHOLD),
    ],
)
def test_variant_is_the_smallest_that_serves_the_row(
    changes: dict[str, Any], variant: SampleVariant
) -> None:
    assert SlotParams(**changes).variant is variant


def test_plan_is_the_strongest_need_of_any_row() -> None:
    greedy = SlotParams(repetition_penalty=1.1)
    nucleus = SlotParams(temperature=1.0, top_p=0.9)
    assert plan_sample([]) == SamplePlan(all_greedy=True, with_top_k=False, with_top_p=False)
    assert plan_sample([greedy]) == SamplePlan(
        with_penalties=True, all_greedy=True, with_top_k=False, with_top_p=False
    )
    assert plan_sample([greedy, nucleus]) == SamplePlan(
        THRESHOLD, with_penalties=True, with_top_k=False, with_top_p=True
    )
    assert plan_sample([SlotParams(num_logprobs=3)]).with_logprobs


def test_minimum_length_without_stop_ids_alters_nothing() -> None:
    assert not SlotParams(min_tokens=4).alters_logits
    assert SlotParams(min_tokens=4, stop_ids=(2,)).alters_logits


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", math.nan),
        ("top_p", 1.5),
        ("min_p", -0.5),
        ("seed", -1),
        ("seed", 1 << 64),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("min_tokens", -1),
        ("stop_ids", tuple(range(17))),
        ("stop_ids", (-3,)),
        ("num_logprobs", 21),
    ],
)
def test_value_out_of_range_is_refused_by_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} is ") as caught:
        SlotParams(**{field: value})
    assert repr(value) in str(caught.value)
