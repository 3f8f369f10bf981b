"""Idle time is the gap between a step's end and the arrival of the next command."""

from __future__ import annotations

from worker.idle_clock import IdleClock


def test_nothing_is_idle_before_the_first_step() -> None:
    clock = IdleClock()
    assert clock.seconds(now=100.0) == 0.0
    clock.step_ended(arrived=200.0, ended=201.0)
    assert clock.seconds_before_last_step == 0.0


def test_gaps_add_up_and_overlaps_leave_none() -> None:
    clock = IdleClock()
    clock.step_ended(arrived=10.0, ended=11.0)
    clock.step_ended(arrived=10.5, ended=12.0)  # it waited behind the first
    clock.step_ended(arrived=12.25, ended=13.0)
    clock.step_ended(arrived=12.25, ended=14.0)  # the same command's second step
    clock.step_ended(arrived=14.5, ended=15.0)
    assert clock.seconds_before_last_step == 0.75


def test_a_heartbeat_sees_the_gap_so_far_and_does_not_end_it() -> None:
    clock = IdleClock()
    clock.step_ended(arrived=10.0, ended=11.0)
    assert [clock.seconds(12.0), clock.seconds(13.0)] == [1.0, 2.0]
    clock.step_ended(arrived=14.0, ended=15.0)
    assert clock.seconds_before_last_step == 3.0
