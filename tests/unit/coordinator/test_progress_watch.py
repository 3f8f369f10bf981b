"""Liveness is progress."""

import pytest

from coordinator.errors import RankLost
from coordinator.progress_watch import ProgressWatch


def test_a_rank_that_owes_nothing_is_never_late() -> None:
    watch = ProgressWatch(2, 1.0)
    watch.sent(1, 1, now=0.0)
    watch.reported(0, 1, 1, 0, now=0.5)
    watch.reported(1, 1, 1, 0, now=0.5)
    watch.check(now=1e9)
    assert watch.is_settled


def test_the_rank_that_waits_longest_is_named_with_its_command() -> None:
    watch = ProgressWatch(2, 1.0)
    watch.sent(1, 1, now=0.0)
    watch.reported(0, 1, 1, 0, now=0.5)
    watch.sent(2, 2, now=0.6)
    watch.check(now=1.0)
    with pytest.raises(RankLost, match=r"rank 1 lost at step 1: command 1 is unreported") as caught:
        watch.check(now=1.7)
    assert (caught.value.rank, caught.value.step) == (1, 1)


def test_a_command_behind_another_is_given_its_own_time() -> None:
    watch = ProgressWatch(1, 1.0)
    watch.sent(1, 1, now=0.0)
    watch.sent(2, 2, now=0.0)
    watch.reported(0, 1, 1, 0, now=0.9)
    watch.check(now=1.8)
    with pytest.raises(RankLost, match="rank 0 lost at step 2"):
        watch.check(now=2.0)


def test_one_report_may_cover_many_commands_and_part_of_one() -> None:
    watch = ProgressWatch(1, 1.0)
    watch.sent(1, 3, now=0.0)
    watch.sent(2, 6, now=0.0)
    watch.reported(0, 2, 5, 77, now=0.1)
    assert watch.num_all_reduces == [77]
    with pytest.raises(RankLost):
        watch.check(now=1.2)
    watch.reported(0, 2, 6, 78, now=0.2)
    assert watch.last_step(0) == 6
    watch.check(now=99.0)


def test_a_heartbeat_is_owed_until_its_own_report() -> None:
    watch = ProgressWatch(1, 1.0)
    watch.sent(1, 1, now=0.0)
    watch.reported(0, 1, 1, 0, now=0.0)
    watch.sent(2, 1, now=5.0)
    with pytest.raises(RankLost, match="command 2"):
        watch.check(now=6.1)
    watch.reported(0, 2, 1, 0, now=6.2)
    assert watch.is_settled


def test_the_longest_wait_is_that_of_the_rank_furthest_behind_and_none_if_nothing_is_owed() -> None:
    watch = ProgressWatch(2, 1.0)
    assert watch.longest_wait_s(now=5.0) == 0
    watch.sent(1, 1, now=5.0)
    watch.sent(2, 2, now=5.0)
    watch.reported(0, 1, 1, 0, now=6.0)
    assert watch.longest_wait_s(now=8.0) == 3.0
    watch.reported(1, 2, 2, 0, now=8.0)
    assert watch.longest_wait_s(now=8.5) == 2.5
    watch.reported(0, 2, 2, 0, now=8.5)
    assert watch.longest_wait_s(now=99.0) == 0
