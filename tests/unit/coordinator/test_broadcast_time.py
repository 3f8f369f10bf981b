"""From sending a command to its arrival, where one clock tells both."""

import pytest

from coordinator.broadcast_time import BroadcastTime


def test_ranks_of_this_host_are_measured_once_a_command() -> None:
    seen: list[tuple[int, float]] = []
    times = BroadcastTime(["here", "here", "there"], "here", lambda *found: seen.append(found))
    times.sent(7, 1.0)
    times.arrived(0, 7, 1_000_250)
    times.arrived(0, 7, 1_000_250)  # its second step
    times.arrived(1, 7, 1_002_000)
    times.arrived(2, 7, 1_002_000)
    assert [rank for rank, _ in seen] == [0, 1]
    assert [seconds for _, seconds in seen] == pytest.approx([0.00025, 0.002])


def test_what_was_not_noted_or_is_long_past_is_left_out() -> None:
    seen: list[tuple[int, float]] = []
    times = BroadcastTime(["here"], "here", lambda *found: seen.append(found))
    for command_id in range(1, 2000):
        times.sent(command_id, float(command_id))
    times.arrived(0, 1999 - 1024, 5)
    times.arrived(0, 1999, 0)
    assert seen == []
