"""When a command came to each rank, compared where clocks can be."""

from coordinator.arrival_skew import ArrivalSkew


def test_the_same_command_is_compared_whoever_reports_first() -> None:
    skew = ArrivalSkew(["h", "h", "h"])
    skew.arrived(1, 7, 1_000_250)
    assert skew.seconds == {}
    skew.arrived(0, 6, 900_000)
    skew.arrived(0, 7, 1_000_000)
    skew.arrived(2, 6, 899_900)
    assert skew.seconds == {1: 0.00025, 2: -0.0001}


def test_ranks_of_other_hosts_and_of_none_known_are_left_out() -> None:
    for boot_ids in (["h", "g"], ["", ""]):
        skew = ArrivalSkew(boot_ids)
        skew.arrived(0, 1, 100)
        skew.arrived(1, 1, 200)
        assert skew.seconds == {}


def test_a_time_that_was_not_noted_is_not_compared() -> None:
    skew = ArrivalSkew(["h", "h"])
    skew.arrived(0, 1, 100)
    skew.arrived(1, 1, 0)
    assert skew.seconds == {}


def test_commands_long_past_are_forgotten_rather_than_mistaken() -> None:
    skew = ArrivalSkew(["h", "h"])
    for command_id in range(1, 3000):
        skew.arrived(0, command_id, command_id * 100)
    skew.arrived(1, 2999 - 1024, 5)
    assert skew.seconds == {}
    skew.arrived(0, 3000, 300_000)
    skew.arrived(1, 3000, 300_001)
    assert skew.seconds == {1: 1e-06}
