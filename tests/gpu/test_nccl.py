"""The collective suite over NCCL, and what only CUDA has: graphs, staging, abort on the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from coordinator.stall_report import RankRecord, report_stall
from tests.gpu import nccl_cases
from tests.unit.tpcomm.collective_suite import CollectiveSuite, World, make_world
from tests.unit.tpcomm.rank_pool import RankPool
from tpcomm import Recorded
from tpcomm.size_table import ADD_RMS_NORM, ALL_GATHER, ALL_REDUCE, NCCL, SEPARATE
from tpcomm.staged_ways import STAGED_WAYS
from worker.record_message import recorded_message

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"),
]

WAYS = [
    *STAGED_WAYS,
    (ALL_GATHER, NCCL),
    (ADD_RMS_NORM, SEPARATE),
    (ALL_REDUCE, NCCL),
]
STAGED_ELEMENTS = 4096
NCCL_ELEMENTS = 4 << 20  # 8 MiB of bfloat16, above the staging buffer


@pytest.fixture(scope="module")
def gpu_pool() -> Iterator[RankPool]:
    pool = RankPool(2, "cuda")
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def world(gpu_pool: RankPool) -> World:
    return make_world(gpu_pool, "nccl", 2, fixed_order=False)


class TestNccl(CollectiveSuite):
    pass


def test_preflight_finds_every_path_sound_and_builds_one_table(world: World) -> None:
    (first, table), (second, other_table) = world.run(nccl_cases.check_paths)
    assert [(r.operation, r.path, r.usable) for r in first] == [(*way, True) for way in WAYS], first
    assert first == second and table == other_table
    assert all(r.times for r in first)


@pytest.mark.parametrize("fault", ["flip", "hang"])
def test_planted_fault_switches_one_shot_off_on_all_ranks(world: World, fault: str) -> None:
    for reports, took in world.run_alone(nccl_cases.planted_fault, fault):
        by_way = {(r.operation, r.path): r for r in reports}
        assert not by_way[STAGED_WAYS[0]].usable
        assert by_way[WAYS[-1]].usable
        # Two-shot stays on unless the state of the memory is unknown.
        assert by_way[STAGED_WAYS[1]].usable == (fault == "flip")
        assert took < 60


def test_several_communicators_in_one_process(world: World) -> None:
    world.run(nccl_cases.several_groups, world.make_id())


def test_every_dtype_and_ragged_size_is_exact(world: World) -> None:
    assert world.run(nccl_cases.every_dtype_and_size) == [[], []]


def test_all_kernels_in_one_graph_with_late_ranks(world: World) -> None:
    assert world.run(nccl_cases.mixed_kernels, 1000) == [0, 0]


@pytest.mark.parametrize("num_elements", [1, 333, STAGED_ELEMENTS, 100_000])
def test_staged_all_reduce_in_a_replayed_graph(world: World, num_elements: int) -> None:
    world.run(nccl_cases.replay_graph, num_elements, 200)


def test_nccl_all_reduce_in_a_replayed_graph(world: World) -> None:
    world.run(nccl_cases.replay_graph, NCCL_ELEMENTS, 20)


@pytest.mark.parametrize("num_elements", [STAGED_ELEMENTS, NCCL_ELEMENTS])
def test_absent_rank_is_named_by_the_records_of_a_stuck_replay(num_elements: int) -> None:
    # Processes of its own: where a graph holds NCCL's kernels, aborting leaves NCCL unfit to join
    # another group in the same process.
    pool = RankPool(2, "cuda")
    try:
        world = make_world(pool, "nccl", 2, fixed_order=False)
        dumps = world.run_alone(nccl_cases.records_of_a_stuck_replay, num_elements)
    finally:
        pool.close()
    assert [freed for *_, freed in dumps] == [True, True]
    messages = [(recorded_message(Recorded(calls)), now_ns) for calls, now_ns, _ in dumps]
    found = report_stall([RankRecord(said.collectives, now_ns) for said, now_ns in messages])
    assert found.behind == [1], found
    waited = dumps[0][0][-1]
    assert (waited.operation, waited.num_bytes) == ("all_reduce", 2 * num_elements)
    assert f"rank 1 has not issued call {waited.sequence}, all_reduce of" in found.line
    assert "in which rank 0 waits" in found.line


def test_late_rank_waits_least_in_the_records(world: World) -> None:
    waits = world.run(nccl_cases.waits_when_the_last_rank_is_late, STAGED_ELEMENTS)
    assert all(early > late for early, late in zip(*waits, strict=True)), waits


@pytest.mark.parametrize("num_elements", [STAGED_ELEMENTS, NCCL_ELEMENTS])
def test_abort_ends_the_waiting_kernel_and_keeps_memory(world: World, num_elements: int) -> None:
    outcomes = world.run_alone(nccl_cases.abort_frees_the_stream, num_elements)
    assert outcomes == ["freed", "absent"]
