"""Predictions from synthetic histories."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.prediction import Load, Predictor

BUDGET = 1000


def learnt(
    steps: list[tuple[int, float]],
    stays: list[tuple[float, int]] = [],  # noqa: B006
) -> Predictor:
    predictor = Predictor(BUDGET)
    for num_tokens, seconds in steps:
        predictor.observe_step(num_tokens, seconds)
    for seconds, num_steps in stays:
        predictor.observe_stay(seconds, num_steps)
    return predictor


def test_without_data_everything_fits_at_once() -> None:
    load = Load(1000, 1e6, num_running=8, num_free_slots=0, num_free_positions=0)
    assert learnt([]).time_to_first_token(10**6, load) == 0.0
    assert learnt([]).time_to_drain(100, 10**6, load) == 0.0
    # Steps without prompts say nothing about prompts.
    assert learnt([(0, 5.0)] * 9).time_to_first_token(1000, Load()) == 0.0


def test_full_steps_give_the_throughput() -> None:
    predictor = learnt([(1000, 0.2)] * 100)
    assert predictor.time_to_first_token(5000, Load()) == pytest.approx(1.0)
    behind = Load(num_requests_ahead=3, num_tokens_ahead=15000, num_free_slots=9)
    assert predictor.time_to_first_token(5000, behind) == pytest.approx(4.0)


def test_short_prompts_in_long_steps_are_not_taken_for_the_throughput() -> None:
    # 10 ms whatever it holds, and 0.1 ms a token: 5 tokens in 10.5 ms are not 476 tokens/s.
    predictor = learnt([(5, 0.0105), (15, 0.0115), (8, 0.0108)] * 40)
    assert predictor.time_to_first_token(4000, Load()) == pytest.approx(4 * 0.010 + 0.4, rel=0.01)


def test_steps_without_prompts_tell_what_a_token_of_prompts_all_alike_costs() -> None:
    predictor = learnt([(32, 0.182), (0, 0.054)] * 50)
    assert predictor.time_to_first_token(8 * 32, Load()) == pytest.approx(0.054 + 8 * 0.128)
    # Where lengths differ they hardly count: other kernels may run then.
    predictor = learnt([(5, 0.0105), (15, 0.0115), (8, 0.0108), (0, 0.008)] * 40)
    assert predictor.time_to_first_token(900, Load()) == pytest.approx(0.010 + 0.09, rel=0.2)


def test_prompts_that_the_ranks_compute_now_are_waited_for_whatever_is_cached() -> None:
    predictor = learnt([(1000, 0.2)] * 10)
    for _ in range(200):
        predictor.observe_admission(1000, 500)
    sent = Load(num_tokens_sent=2000)
    assert predictor.time_to_first_token(2000, sent) == pytest.approx(0.4 + 0.2, rel=0.01)


def test_rows_that_decode_leave_less_of_a_step_to_prompts() -> None:
    predictor = learnt([(1000, 0.2)] * 100)
    beside = Load(num_running=500, num_free_slots=9)
    assert predictor.time_to_first_token(5000, beside) == pytest.approx(2.0)


def test_a_lack_of_slots_waits_for_requests_to_end() -> None:
    predictor = learnt([(1000, 0.001)] * 10, [(8.0, 80)] * 10)
    full = Load(num_requests_ahead=7, num_running=16, num_free_slots=0)
    # 8 have to end of 16 that stay 8 s each.
    assert predictor.time_to_first_token(1, full) == pytest.approx(4.0, abs=0.01)
    assert predictor.time_to_first_token(1, replace(full, num_free_slots=8)) < 0.01
    assert predictor.time_to_drain(2, 0, full) == pytest.approx(1.0)


def test_after_a_rush_no_slot_comes_free_before_the_first_has_taken_its_steps() -> None:
    predictor = learnt([(1000, 0.001)] * 10, [(2.0, 40)] * 10)
    # All began together and are twice as slow as those before, 10 of 40 steps done.
    full = Load(num_running=16, num_free_slots=0, slot_age_s=1.0, slot_age_steps=10)
    assert predictor.time_to_first_token(1, full) == pytest.approx(3.0, abs=0.01)
    none_done = replace(full, slot_age_s=0.0, slot_age_steps=0)
    assert predictor.time_to_first_token(1, none_done) == pytest.approx(2.0, abs=0.01)
    # Taken one by one, the oldest has one step left of 16 apart: as often as one ends.
    steady = replace(full, slot_age_s=1.9, slot_age_steps=38)
    assert predictor.time_to_first_token(1, steady) == pytest.approx(2.0 / 16, abs=0.01)


def test_where_stays_differ_much_a_rush_is_not_taken_to_end_together() -> None:
    predictor = learnt([(1000, 0.001)] * 10, [(0.1, 2), (4.0, 80)] * 100)
    full = Load(num_running=16, num_free_slots=0, slot_age_s=0.1, slot_age_steps=2)
    assert predictor.time_to_first_token(1, full) == pytest.approx(2.0 / 16, rel=0.1)


def test_a_lack_of_blocks_waits_for_what_is_in_use() -> None:
    predictor = learnt([(1000, 0.001)] * 10, [(8.0, 80)] * 10)
    load = Load(num_running=4, num_used_positions=1000, num_free_positions=100)
    assert predictor.time_to_first_token(350, load) == pytest.approx(2.0, abs=0.01)
    assert predictor.time_to_first_token(100, load) < 0.01


def test_prompts_are_expected_in_the_prefix_cache_as_often_as_the_last_ones_were() -> None:
    predictor = learnt([(1000, 0.2)] * 10, [(8.0, 80)] * 10)
    for _ in range(200):
        predictor.observe_admission(1000, 750)
        predictor.observe_admission(200, 50)
    # 400 of 1,200 tokens are computed.
    behind = Load(num_requests_ahead=1, num_tokens_ahead=12_000, num_free_slots=9)
    assert predictor.time_to_first_token(3_000, behind) == pytest.approx(1.0, rel=0.05)
    assert predictor.time_to_drain(0, 15_000, behind) == pytest.approx(1.0, rel=0.05)
    for _ in range(200):
        predictor.observe_admission(1000, 0)
    assert predictor.time_to_first_token(3_000, behind) == pytest.approx(3.0, rel=0.05)


def test_recent_steps_count_more_than_old_ones() -> None:
    predictor = learnt([(1000, 0.1)] * 300 + [(1000, 0.4)] * 300)
    assert predictor.time_to_first_token(1000, Load()) == pytest.approx(0.4, rel=0.02)


STEPS = st.lists(st.tuples(st.integers(0, 2000), st.floats(1e-5, 10.0)), max_size=40)
STAYS = st.lists(st.tuples(st.floats(0.0, 1e4), st.integers(0, 10**5)), max_size=10)
LOADS = st.builds(
    Load,
    num_requests_ahead=st.floats(0, 1e4),
    num_tokens_ahead=st.floats(0, 1e7),
    num_tokens_sent=st.integers(0, 10**4),
    slot_age_s=st.floats(0, 1e4),
    slot_age_steps=st.integers(0, 10**5) | st.just(math.inf),
    num_running=st.integers(0, 1024),
    num_free_slots=st.integers(0, 1024),
    num_used_positions=st.integers(0, 10**7),
    num_free_positions=st.integers(0, 10**7),
)


@given(
    steps=STEPS,
    stays=STAYS,
    load=LOADS,
    own=st.integers(1, 10**5),
    more=st.tuples(st.floats(0, 100), st.floats(0, 1e5), st.integers(0, 10**4)),
    cached=st.lists(st.integers(0, 100), max_size=3),
)
def test_more_ahead_is_never_predicted_to_be_sooner(
    steps: list[tuple[int, float]],
    stays: list[tuple[float, int]],
    load: Load,
    own: int,
    more: tuple[float, float, int],
    cached: list[int],
) -> None:
    predictor = learnt(steps, stays)
    for num_cached in cached:
        predictor.observe_admission(100, num_cached)
    longer = replace(
        load,
        num_requests_ahead=load.num_requests_ahead + more[0],
        num_tokens_ahead=load.num_tokens_ahead + more[1],
        num_tokens_sent=load.num_tokens_sent + more[2],
    )
    before = predictor.time_to_first_token(own, load)
    after = predictor.time_to_first_token(own + more[2], longer)
    assert 0.0 <= before <= after * (1 + 1e-9)
    assert predictor.time_to_drain(5, own, load) <= predictor.time_to_drain(6, own + 1, load)


def test_the_property_sees_a_prediction_that_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Predictor, "_fit", lambda self: (self._y, -self._y / 10))
    check = test_more_ahead_is_never_predicted_to_be_sooner.hypothesis.inner_test  # type: ignore[attr-defined]
    with pytest.raises(AssertionError):
        check([(100, 1.0)], [], Load(num_free_slots=99), 100, (1.0, 500.0, 0), [])
