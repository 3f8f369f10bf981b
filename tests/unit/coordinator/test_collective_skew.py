"""Who comes late to collectives, from what the ranks waited in them."""

import pytest

from coordinator.collective_skew import CollectiveSkew, slowest_rank


def test_the_rank_that_waits_least_is_the_slowest() -> None:
    skew = CollectiveSkew(3)
    for rank in range(3):
        skew.reported(rank, 1000, 0)
    assert skew.seconds == {} and slowest_rank(skew.seconds) is None
    skew.reported(0, 1100, 5000)
    skew.reported(1, 1200, 1000)
    assert skew.seconds == {}
    skew.reported(2, 1200, 8000)
    assert skew.seconds == pytest.approx({0: 0.0, 1: 45e-6, 2: 10e-6})
    assert slowest_rank(skew.seconds) == 1


def test_totals_that_have_not_moved_change_nothing() -> None:
    skew = CollectiveSkew(2)
    for count, micros in ((10, 100), (20, 300), (20, 300)):
        skew.reported(0, count, micros)
        skew.reported(1, count, 2 * micros)
    assert skew.seconds == pytest.approx({0: 20e-6, 1: 0.0})


def test_totals_of_a_group_before_are_not_compared() -> None:
    skew = CollectiveSkew(2)
    skew.reported(0, 5000, 900_000)
    skew.reported(0, 10, 100)
    for count, micros in ((10, 100), (20, 200)):
        skew.reported(1, count, micros)
    assert skew.seconds == {}
    skew.reported(0, 20, 300)
    assert skew.seconds == pytest.approx({0: 0.0, 1: 10e-6})


def test_one_rank_is_compared_with_nobody() -> None:
    skew = CollectiveSkew(1)
    skew.reported(0, 10, 100)
    skew.reported(0, 20, 200)
    assert skew.seconds == {}
