"""The shared suite over the CPU backends, and what only they promise."""

from __future__ import annotations

import pytest

from tests.unit.tpcomm import cases
from tests.unit.tpcomm.collective_suite import CollectiveSuite, World, make_world
from tests.unit.tpcomm.rank_pool import RankPool
from tpcomm import create_group_id


@pytest.fixture(scope="session", params=["shm-2", "shm-3", "gloo-2", "gloo-3"])
def world(request: pytest.FixtureRequest, rank_pool: RankPool) -> World:
    backend, size = request.param.split("-")
    return make_world(rank_pool, backend, int(size), fixed_order=True)


class TestCollectives(CollectiveSuite):
    pass


@pytest.mark.parametrize("call", ["all_reduce", "barrier"])
def test_timeout_names_the_rank_that_did_not_arrive(world: World, call: str) -> None:
    absent = world.size - 1
    told = world.run_alone(cases.call_with_absent_rank, absent, call)
    for message, missing in told[:absent]:
        assert missing == (absent,)
        assert f"rank {absent} did not arrive" in message


@pytest.mark.parametrize("absent", [0, 1])
def test_join_timeout_names_the_rank_that_did_not_come(world: World, absent: int) -> None:
    told = world.run_alone(cases.join_with_absent_rank, absent)
    first = 1 - absent
    assert told[first][1] == (absent,)
    assert f"rank {absent} did not" in told[first][0]


def test_calls_that_differ_between_ranks_are_refused_by_name(rank_pool: RankPool) -> None:
    messages = rank_pool.run(2, cases.mismatched_calls, create_group_id("shm"))
    assert any("all_reduce sum of 12 bytes" in m and "of 20 bytes" in m for m in messages)
    assert "completed" not in messages


def test_killed_rank_is_named_and_leaves_no_segment(rank_pool: RankPool) -> None:
    group_id = create_group_id("shm")
    name = cases._name_of(group_id)
    (message, mapped_0), (_, mapped_1) = rank_pool.run(2, cases.kill_a_rank, group_id)
    assert "rank 1 did not arrive" in message
    assert not [line for line in mapped_0 + mapped_1 if name in line]


def test_segment_probe_sees_a_segment_in_use(rank_pool: RankPool) -> None:
    assert rank_pool.run(2, cases.segment_mapped, create_group_id("shm")) == [True, True]
