"""Kill -9 of a rank while a graph replays: the survivor is freed, and its graph goes on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.gpu import rejoin_cases
from tpcomm import create_group_id
from tpcomm.bench.rank_pool import RankPool, RanksFailed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"),
]


def test_the_survivors_graph_goes_on_with_a_new_peer() -> None:
    first_id, second_id = create_group_id("nccl"), create_group_id("nccl")
    pool = RankPool(2, first_id, rejoin_cases.STAGING_BYTES, {})
    newcomer = RankPool(1, first_id, rejoin_cases.STAGING_BYTES, {})
    try:
        with ThreadPoolExecutor(1) as threads:
            joined = threads.submit(newcomer.run, rejoin_cases.replace, second_id, limit_s=120)
            with pytest.raises(RanksFailed, match="rank 1: its process died") as lost:
                pool.run(rejoin_cases.survive, second_id, limit_s=120)
            assert joined.result(130) == [True]
    finally:
        pool.kill()
        newcomer.kill()
    (outcome,) = lost.value.replies
    assert outcome["before"] and outcome["was_stuck"] and outcome["again"] and outcome["intact"]
    assert outcome["freed_s"] < rejoin_cases.ABORT_LIMIT_S
