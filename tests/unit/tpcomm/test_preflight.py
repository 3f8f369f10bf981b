"""Paths are checked on real groups; wrong, failing and hanging ones are planted."""

from __future__ import annotations

import pytest
import torch

from tests.unit.tpcomm import preflight_cases
from tests.unit.tpcomm.rank_pool import RankPool
from tpcomm import create_communicator, create_group_id, preflight


@pytest.fixture(scope="module")
def group_id() -> bytes:
    return create_group_id("shm")


@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_sound_backend_is_usable_on_all_ranks(rank_pool: RankPool, backend: str) -> None:
    first, second = rank_pool.run(2, preflight_cases.sound, backend, create_group_id(backend))
    assert first == second
    assert [(report.path, report.usable) for report in first] == [(backend, True)]
    assert "17 cases bit for bit, up to 1048576 bytes" in first[0].detail


def test_group_of_one_is_usable() -> None:
    comm = create_communicator("shm", b"", 0, 1, torch.device("cpu"), 1.0)
    assert [(r.path, r.usable) for r in preflight(comm, 1.0)] == [("local", True)]


def test_sound_second_path_stays_on(rank_pool: RankPool, group_id: bytes) -> None:
    for reports, events in rank_pool.run(2, preflight_cases.planted, group_id, "none"):
        assert [(r.path, r.usable) for r in reports] == [("planted", True), ("shm", True)]
        assert events == ["prepared"]


@pytest.mark.parametrize(
    ("fault", "seen_by_rank_1", "events_of_rank_1"),
    [
        ("flip", "SUM of 333 torch.float32: 1 elements wrong, first at 1", ["off", "prepared"]),
        ("raise", "planted error", ["off", "prepared"]),
        ("hang", "planted hang", ["off, hung", "prepared", "rescued"]),
    ],
)
def test_fault_on_one_rank_switches_the_path_off_on_all(
    rank_pool: RankPool,
    group_id: bytes,
    fault: str,
    seen_by_rank_1: str,
    events_of_rank_1: list[str],
) -> None:
    (first, events_0), (second, events_1) = rank_pool.run(
        2, preflight_cases.planted, group_id, fault
    )
    for reports in (first, second):
        assert [(r.path, r.usable) for r in reports] == [("planted", False), ("shm", True)]
    assert first[0].detail == "another rank found it wrong"
    assert seen_by_rank_1 in second[0].detail
    assert events_0 == [event for event in events_of_rank_1 if event != "rescued"]
    assert events_1 == events_of_rank_1


def test_absent_path_is_reported_and_not_touched(rank_pool: RankPool, group_id: bytes) -> None:
    for reports, events in rank_pool.run(2, preflight_cases.planted, group_id, "absent"):
        assert (reports[0].usable, reports[0].detail) == (False, "planted absence")
        assert reports[1].usable
        assert events == []


def test_nothing_is_usable_when_the_groups_own_path_is_wrong(
    rank_pool: RankPool, group_id: bytes
) -> None:
    first, second = rank_pool.run(2, preflight_cases.broken_base, group_id)
    for reports in (first, second):
        assert [report.usable for report in reports] == [False, False]
        assert reports[0].detail == "base does not work"
    assert "first at 4095" in second[1].detail


def test_lost_peer_ends_in_a_report_that_names_it(rank_pool: RankPool) -> None:
    reports = rank_pool.run(2, preflight_cases.lost_peer, create_group_id("shm"))[0]
    assert not reports[0].usable
    assert "rank 1 did not arrive" in reports[0].detail


def test_times_are_the_slowest_ranks_and_give_one_table(rank_pool: RankPool) -> None:
    first, second = rank_pool.run(2, preflight_cases.planted_times, create_group_id("shm"), "none")
    assert first == second
    rows, events, table = first
    assert events == []
    times = {name: of for name, _, of in rows}
    assert times["fast"][8192] == 2.5 and times["slow"][8192] == 5.75
    assert times["shm"] == {}  # has no measure
    # fast: 1.5 + k us, slow: 5.5 + k / 4 us for the k-th size; equal at k = 5.33.
    assert table.startswith("all_reduce: fast to 131072, slow to 1048576;")


def test_path_that_hangs_while_it_is_timed_is_off_and_what_shares_its_memory_with_it(
    rank_pool: RankPool,
) -> None:
    first, second = rank_pool.run(2, preflight_cases.planted_times, create_group_id("shm"), "hang")
    for rows, _, table in (first, second):
        assert [(name, usable) for name, usable, _ in rows] == [
            ("fast", False),
            ("slow", False),
            ("shm", True),
        ]
        assert table.startswith("all_reduce: nothing staged;")
    assert first[1] == ["fast off: another rank found it wrong"]
    assert second[1] == ["rescued", "fast off: planted hang"]
