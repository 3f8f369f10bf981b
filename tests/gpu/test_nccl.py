"""The collective suite over NCCL, and what only CUDA has: graphs, staging, abort on the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu import nccl_cases
from tests.unit.tpcomm.collective_suite import CollectiveSuite, World, make_world
from tests.unit.tpcomm.rank_pool import RankPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"),
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


def test_preflight_finds_both_paths_sound(world: World) -> None:
    for reports in world.run(nccl_cases.check_paths):
        assert [(r.path, r.usable) for r in reports] == [("staged", True), ("nccl", True)], reports


@pytest.mark.parametrize("num_elements", [1, 333, STAGED_ELEMENTS, 100_000])
def test_staged_all_reduce_in_a_replayed_graph(world: World, num_elements: int) -> None:
    world.run(nccl_cases.replay_graph, num_elements, 200)


def test_nccl_all_reduce_in_a_replayed_graph(world: World) -> None:
    world.run(nccl_cases.replay_graph, NCCL_ELEMENTS, 20)


@pytest.mark.parametrize("num_elements", [STAGED_ELEMENTS, NCCL_ELEMENTS])
def test_abort_ends_the_waiting_kernel_and_keeps_memory(world: World, num_elements: int) -> None:
    outcomes = world.run_alone(nccl_cases.abort_frees_the_stream, num_elements)
    assert outcomes == ["freed", "absent"]
