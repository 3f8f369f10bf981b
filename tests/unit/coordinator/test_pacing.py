"""Two steps to about four milliseconds of work are outstanding."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.outstanding import Outstanding, SentCommand
from coordinator.pacing import Pacing


def settled(decode_micros: int, mixed_micros: int = 4000) -> Pacing:
    pacing = Pacing()
    for _ in range(200):
        pacing.observe(decode_micros, 0, is_mixed=False)
        pacing.observe(mixed_micros, 0, is_mixed=True)
    return pacing


def filled(
    pacing: Pacing, outstanding: Outstanding, num_steps: int, has_constrained: bool = False
) -> list[int]:
    """Sends until enough is outstanding; returns the steps of each command sent."""
    sent = []
    last_step = outstanding.last_reported_step
    last_step += outstanding.num_decode_steps + outstanding.num_mixed_steps
    while pacing.wants_more(outstanding, num_steps, has_constrained):
        command_id = last_step + 1
        outstanding.add(SentCommand(command_id, last_step + 1, num_steps, [], []))
        last_step += num_steps
        sent.append(num_steps)
    return sent


@pytest.mark.parametrize(
    ("micros", "commands"),
    [
        (200, [8, 8]),
        (300, [6, 6]),
        (600, [3, 3]),
        (900, [2, 2]),
        (1500, [1, 1]),
        (2000, [1, 1]),
        (5000, [1, 1]),
        (500_000, [1, 1]),
    ],
)
def test_quick_steps_are_granted_several_at_a_time_in_two_commands(
    micros: int, commands: list[int]
) -> None:
    pacing = settled(micros)
    assert filled(pacing, Outstanding(), pacing.steps_per_grant) == commands


@pytest.mark.parametrize(("micros", "count"), [(600, 6), (950, 4), (100, 16)])
def test_single_steps_make_up_the_same_time_in_more_commands(micros: int, count: int) -> None:
    assert filled(settled(micros), Outstanding(), 1) == [1] * count


@given(micros=st.integers(1, 10**6), num_steps=st.integers(1, 8))
def test_the_ranks_never_have_less_than_two_commands_nor_long_queues(
    micros: int, num_steps: int
) -> None:
    pacing = settled(micros)
    outstanding = Outstanding()
    num_ahead = sum(filled(pacing, outstanding, num_steps))
    assert len(outstanding) >= 2
    assert num_ahead * pacing.decode_step_s <= 0.0041 or num_ahead == 2 * num_steps


def test_one_is_sent_behind_a_command_of_many_steps_of_which_none_is_reported() -> None:
    pacing = settled(2000)
    outstanding = Outstanding()
    outstanding.add(SentCommand(1, 1, 3, [], [], has_chunks=True))
    assert filled(pacing, outstanding, 3) == [3]


@pytest.mark.parametrize(
    ("micros", "elapsed_ms", "early_ms"),
    [(10_000, 0, 6), (10_000, 2.5, 3.5), (10_000, 5.5, 0), (10_000, 30, 0), (4000, 0, 0)],
)
def test_behind_a_long_decode_step_nothing_is_sent_until_four_milliseconds_are_left(
    micros: int, elapsed_ms: float, early_ms: float
) -> None:
    pacing, outstanding = settled(micros), Outstanding()
    assert pacing.too_early_s(outstanding, 0.0) == 0.0  # nothing runs
    outstanding.add(SentCommand(1, 1, 1, [], []))
    early_s = pacing.too_early_s(outstanding, elapsed_ms / 1e3)
    assert early_s == pytest.approx(early_ms / 1e3, abs=1e-6)


def test_behind_steps_of_which_the_end_is_not_known_the_next_is_sent_earlier() -> None:
    pacing, outstanding = settled(20_000), Outstanding()
    outstanding.add(SentCommand(1, 1, 1, [], []))
    for micros in [17_000, 23_000] * 100:
        pacing.observe(micros, 0, is_mixed=False)
    assert pacing.too_early_s(outstanding, 0.0) == pytest.approx(0.016 - 3 * 0.003, abs=1e-3)


def test_a_step_with_chunks_gets_one_behind_it_at_once() -> None:
    pacing, outstanding = settled(10_000, mixed_micros=50_000), Outstanding()
    outstanding.add(SentCommand(1, 1, 1, [], [], has_chunks=True))
    assert pacing.too_early_s(outstanding, 0.0) == 0.0


def test_ranks_that_run_dry_get_the_next_long_step_earlier() -> None:
    pacing, outstanding = settled(10_000), Outstanding()
    outstanding.add(SentCommand(1, 1, 1, [], []))
    for count in range(300):
        pacing.planned(has_work=True)
        pacing.observe(10_000, 200 * count, is_mixed=False)
    assert pacing.too_early_s(outstanding, 0.0) == 0.0


def test_beside_a_constrained_row_no_long_step_has_more_than_12_milliseconds_behind_it() -> None:
    pacing, outstanding = settled(30_000), Outstanding()
    outstanding.add(SentCommand(1, 1, 1, [], []))
    pacing.ahead_s = 0.024
    assert pacing.too_early_s(outstanding, 0.0) == pytest.approx(0.006)
    assert pacing.too_early_s(outstanding, 0.0, has_constrained=True) == pytest.approx(0.018)


def test_a_long_step_with_chunks_counts_with_its_own_time() -> None:
    pacing = settled(600, mixed_micros=30_000)
    outstanding = Outstanding()
    outstanding.add(SentCommand(1, 1, 1, [], [], has_chunks=True))
    assert outstanding.num_mixed_steps == 1
    assert filled(pacing, outstanding, 1) == [1]  # one behind the running one, and no more
    assert pacing.steps_per_grant == 3  # which a slow mixed step does not change


def test_a_reported_step_is_outstanding_no_more() -> None:
    outstanding = Outstanding()
    outstanding.add(SentCommand(1, 1, 3, [], [], has_chunks=True))
    outstanding.add(SentCommand(2, 4, 2, [], []))
    counts = []
    for command_id, step in [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5)]:
        counts.append((outstanding.num_decode_steps, outstanding.num_mixed_steps))
        assert outstanding.is_mixed_step_next == (step == 1)
        outstanding.resolve(command_id, step)
    assert counts == [(4, 1), (4, 0), (3, 0), (2, 0), (1, 0)]
    assert (outstanding.num_decode_steps, outstanding.num_mixed_steps, len(outstanding)) == (0,) * 3


def after_waits(pacing: Pacing, waits_micros: list[int], has_work: bool = True) -> Pacing:
    """Steps of 2 ms, before each of which rank 0 waited."""
    total = 0
    for waited in waits_micros:
        total += waited
        pacing.planned(has_work)
        pacing.observe(2000, total, is_mixed=False)
    return pacing


def test_ranks_that_run_dry_get_more_work_ahead_within_a_bound_and_less_again_later() -> None:
    pacing = settled(2000)
    assert after_waits(pacing, [100] * 300).ahead_s == 0.024
    assert filled(pacing, Outstanding(), pacing.steps_per_grant) == [3, 3, 3, 3]
    beside_a_constrained_row = filled(pacing, Outstanding(), pacing.steps_per_grant, True)
    assert beside_a_constrained_row == [3, 3]
    assert after_waits(pacing, [0] * 4000).ahead_s == 0.004


def test_ranks_that_wait_because_nobody_asks_get_no_more_work_ahead() -> None:
    assert after_waits(settled(2000), [10**6] * 300, has_work=False).ahead_s == 0.004
