"""The phases of a start, and which of several errors counts."""

import asyncio

import pytest

from coordinator.errors import RankLost, StartRefused
from coordinator.startup import gather_ranks, host_of
from lockstep.daemon.exit_codes import ExitCode
from tests.helpers.engine_harness import running_group
from tests.helpers.fake_worker import FakeSettings


async def answer(value: int) -> int:
    return value


async def complain() -> int:
    raise StartRefused(ExitCode.DEVICE, "my peer is gone")


async def vanish() -> int:
    await asyncio.sleep(0.05)
    raise RankLost(1, 0, "gone")


def test_answers_come_in_order_of_rank() -> None:
    assert asyncio.run(gather_ranks([answer(5), answer(6)])) == [5, 6]


def test_a_rank_that_vanished_counts_before_one_that_complains_of_it() -> None:
    with pytest.raises(RankLost, match="gone"):
        asyncio.run(gather_ranks([complain(), vanish()]))


def test_a_rank_that_complains_ends_the_phase_though_others_would_wait() -> None:
    async def wait() -> int:
        await asyncio.sleep(60)
        return 0

    with pytest.raises(StartRefused, match="my peer is gone"):
        asyncio.run(gather_ranks([complain(), wait()]))


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("10.0.0.1:50100", "10.0.0.1"),
        ("gpu-7.pods:50100", "gpu-7.pods"),
        ("[fd00::1]:1", "fd00::1"),
    ],
)
def test_ranks_meet_at_the_host_of_an_address(address: str, host: str) -> None:
    assert host_of(address) == host


def test_phases_come_in_order_on_every_rank_and_are_timed() -> None:
    async def run() -> None:
        settings = [FakeSettings(num_blocks=70), FakeSettings(num_blocks=50)]
        async with running_group(settings, max_model_len=180, comm="gloo") as group:
            phases = ["Hello", "Load", "Join", "Preflight", "Capture", "InitKvCache"]
            assert group.workers[1].calls[: len(phases)] == phases
            assert group.workers[0].calls[2] == "CreateGroupId"
            assert group.workers[0].meeting_host == "127.0.0.1"
            config = group.workers[1].config
            assert config == group.workers[0].config
            assert (config.dtype, config.comm, config.max_model_len) == ("float32", "gloo", 180)
            state = group.heard.states[-1]
            assert (state.server.block_count, state.max_model_len) == (50, 180)
            assert set(group.metrics.startup_seconds) == {
                *("hello", "load", "join", "preflight", "capture", "init_kv_cache", "total")
            }

    asyncio.run(run())
