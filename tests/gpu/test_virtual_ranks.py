"""More ranks than GPUs: the kernels for 3, 4 and 8 ranks, as streams of one GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tpcomm import create_group_id
from tpcomm.bench.rank_pool import RankPool
from tpcomm.bench.virtual import check_virtual_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),  # nearly all of it compiles the kernels of each rank
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 1 GPU"),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    queues = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}  # one for each virtual rank
    pool = RankPool(1, create_group_id("nccl"), 0, queues)
    yield pool
    pool.kill()


@pytest.mark.parametrize("world_size", [3, 4, 8])
def test_virtual_ranks_get_exact_results(pool: RankPool, world_size: int) -> None:
    assert pool.run(check_virtual_ranks, world_size, limit_s=240) == [""]
