"""Losing a rank: every guard with the fault planted that it is there for."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import grpc
import pytest

from coordinator.errors import StartRefused
from lockstep.daemon.exit_codes import ExitCode
from protos.lockstep.v1 import worker_pb2
from tests.helpers.engine_harness import Harness, running_group, wait_for_group
from tests.helpers.fake_worker import FakeSettings, expected_output


def two() -> list[FakeSettings]:
    return [FakeSettings(num_blocks=256, delay_s=0.002) for _ in range(2)]


async def lose(group: Harness, plant: Callable[[], None]) -> str:
    """Runs a request until it has tokens, plants the fault and returns how the request ended."""
    group.submit(1, [1, 2], 400)
    group.submit(2, [1, 2], 400)
    await group.heard.until(lambda: len(group.heard.tokens.get(2, [])) > 2)
    plant()
    await group.heard.end_of(1, 2)
    for handle in (1, 2):
        (ended,) = group.heard.ended[handle]
        assert ended.status_code == grpc.StatusCode.UNAVAILABLE.value[0]
        assert ended.retry_after_seconds > 0
    return group.heard.ended[1][0].status_message


@pytest.mark.parametrize("rank", [0, 1])
def test_a_refused_command_names_the_rank_and_its_words(rank: int) -> None:
    async def run() -> None:
        settings = two()
        settings[rank].refuse_at_command = 20
        async with running_group(settings) as group:
            message = await lose(group, lambda: None)
            assert message.startswith(f"rank {rank} lost at step ")
            assert "refused command 20: planted refusal" in message

    asyncio.run(run())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failed_step_names_the_rank_the_step_and_the_error(rank: int) -> None:
    async def run() -> None:
        settings = two()
        settings[rank].fail_at_command = 20
        async with running_group(settings) as group:
            message = await lose(group, lambda: None)
            assert message == f"rank {rank} lost at step 20: failed in command 20: planted failure"

    asyncio.run(run())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_broken_stream_names_the_rank(rank: int) -> None:
    async def run() -> None:
        settings = two()
        settings[rank].break_stream_at_command = 20
        async with running_group(settings) as group:
            message = await lose(group, lambda: None)
            assert message.startswith(f"rank {rank} lost at step ")
            assert "ended the step stream" in message

    asyncio.run(run())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named(rank: int) -> None:
    async def run() -> None:
        settings = two()
        async with running_group(settings) as group:
            killed: list[asyncio.Task[None]] = []

            def kill() -> None:
                killed.append(asyncio.create_task(group.workers[rank].stop()))

            message = await lose(group, kill)
            assert message.startswith(f"rank {rank} lost at step ")
            await killed[0]

    asyncio.run(run())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stalled_rank_that_does_not_answer_is_named_not_the_one_that_waits(rank: int) -> None:
    async def run() -> None:
        settings = two()
        async with running_group(settings, step_timeout=0.5) as group:

            def stall() -> None:
                for one in settings:  # as when one rank stops and the other waits for it
                    one.is_stalled = True
                settings[rank].silent_on_quiesce = True
                settings[1 - rank].last_error = "CommTimeout: peer did not come"

            message = await lose(group, stall)
            assert message.startswith(f"rank {rank} lost at step ")

    asyncio.run(run())


def collectives(*ended: bool) -> list[worker_pb2.CollectiveRecord]:
    now = time.monotonic_ns()
    return [
        worker_pb2.CollectiveRecord(
            sequence=7 + number,
            operation="all_reduce",
            path="one_shot",
            byte_count=8192,
            begun_nanos=now,
            ended_nanos=now * is_ended,
        )
        for number, is_ended in enumerate(ended)
    ]


def test_the_records_of_a_stall_name_the_rank_and_the_collective_to_clients_and_operators() -> None:
    async def run() -> None:
        settings = two()
        settings[0].collectives = collectives(True, False)
        settings[1].collectives = collectives(True)
        async with running_group(settings, step_timeout=0.5) as group:

            def stall() -> None:
                for one in settings:
                    one.is_stalled = True

            message = await lose(group, stall)
            assert message.startswith("rank 1 lost at step ")
            assert "others wait for it (seen at rank 0" in message or "unreported" in message
            finding = "rank 1 has not issued call 8, all_reduce of 8192 bytes by one_shot"
            assert finding in message
            stalled = group.heard.states[-1].server.last_stall.splitlines()
            assert finding in stalled[0]
            assert [line[:14] for line in stalled[1:]] == [
                "rank 0: call 7",
                "rank 0: call 8",
                "rank 1: call 7",
            ]
            # What an abort frees looks as if it had ended.
            for worker in group.workers:
                asked = [call for call in worker.calls if call in ("DumpFlightRecorder", "Quiesce")]
                assert asked == ["DumpFlightRecorder", "Quiesce"]

    asyncio.run(run())


def test_records_without_a_stall_are_no_part_of_the_error() -> None:
    async def run() -> None:
        settings = two()
        for one in settings:
            one.collectives = collectives(True)
        settings[1].fail_at_command = 20
        async with running_group(settings) as group:
            message = await lose(group, lambda: None)
            assert message == "rank 1 lost at step 20: failed in command 20: planted failure"
            assert not group.heard.states[-1].server.last_stall

    asyncio.run(run())


def test_an_answer_to_quiesce_with_an_error_of_its_own_names_the_root() -> None:
    async def run() -> None:
        settings = two()
        async with running_group(settings, step_timeout=0.5) as group:

            def stall() -> None:
                for one in settings:
                    one.is_stalled = True
                settings[0].last_error = "CommAborted: told to"
                settings[1].last_error = "RuntimeError: illegal address"

            message = await lose(group, stall)
            assert "rank 1 lost" in message and "illegal address" in message

    asyncio.run(run())


def test_the_group_starts_again_under_a_higher_epoch_and_serves() -> None:
    async def run() -> None:
        settings = two()
        settings[1].fail_at_command = 10
        async with running_group(settings) as group:
            await lose(group, lambda: None)
            assert not group.status.is_ready
            assert group.metrics.rank_up == {0: False, 1: False}
            first_epoch = group.heard.states[-1].server.epoch
            group.submit(3, [1], 2)
            refused = group.heard.ended[3][0]
            assert refused.status_code == grpc.StatusCode.UNAVAILABLE.value[0]
            settings[1].fail_at_command = 0
            await group.restart_workers()
            await group.heard.until(lambda: group.heard.states[-1].is_ready)
            assert group.heard.states[-1].server.epoch == first_epoch + 1
            group.submit(4, [9, 8], 5)
            await group.heard.end_of(4)
            assert group.heard.tokens[4] == expected_output([9, 8], 5)
            assert group.metrics.group_restarts == 1

    asyncio.run(run())


def test_a_silent_local_rank_is_not_killed_when_its_process_is_not_the_one_that_said_hello() -> (
    None
):
    # FakeWorker tells a start time that is not its own: were the check missing, this test process
    # would be killed.
    async def run() -> None:
        settings = two()
        async with running_group(settings, step_timeout=0.5) as group:

            def stall() -> None:
                settings[0].is_stalled = True
                settings[0].silent_on_quiesce = True

            await lose(group, stall)

    asyncio.run(run())


def test_an_idle_group_gets_heartbeats_and_a_stalled_one_is_found_without_requests() -> None:
    async def run() -> None:
        settings = two()
        async with running_group(settings, step_timeout=0.4) as group:
            async with asyncio.timeout(10):
                while len(group.workers[1].commands) < 3:
                    await asyncio.sleep(0.01)
            assert all(command.step_count == 0 for command in group.workers[1].commands)
            assert all(command.table_digest for command in group.workers[1].commands)
            settings[1].is_stalled = True
            await group.heard.until(lambda: not group.heard.states[-1].is_ready)
            assert "rank 1 lost" in group.heard.states[-1].cause

    asyncio.run(run())


def test_three_failures_in_ten_minutes_end_the_coordinator_with_group_lost() -> None:
    async def run() -> None:
        settings = two()
        settings[0].fail_at_command = 1
        async with running_group(settings, step_timeout=0.4) as group:
            for _ in range(2):
                await group.restart_workers()
            async with asyncio.timeout(20):
                with pytest.raises(StartRefused, match="3 failures") as caught:
                    await asyncio.shield(group.task)
            assert caught.value.exit_code == ExitCode.GROUP_LOST

    asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "exit_code", "words"),
    [
        ({"version": "9.9"}, ExitCode.CONFIG, "is version 9.9, the coordinator 0."),
        ({"digest": "abc"}, ExitCode.CHECKPOINT, "digest abc, the coordinator's is digest"),
        ({"vocab_size": 5}, ExitCode.DEVICE, "rank 1 has vocab_size 5, rank 0 1000"),
        ({"num_blocks": 1}, ExitCode.DEVICE, "the KV cache holds 0 tokens"),
        (
            {"phase_errors": {"Load": (grpc.StatusCode.INVALID_ARGUMENT, "no such tensor")}},
            ExitCode.CHECKPOINT,
            "Load: no such tensor",
        ),
        (
            {"phase_errors": {"Join": (grpc.StatusCode.INTERNAL, "NcclNotFound")}},
            ExitCode.DEVICE,
            "Join: NcclNotFound",
        ),
        (
            {"phase_errors": {"Hello": (grpc.StatusCode.FAILED_PRECONDITION, "version 1")}},
            ExitCode.CONFIG,
            "Hello: version 1",
        ),
    ],
)
def test_a_start_that_no_retry_mends_is_refused(
    change: dict[str, object], exit_code: ExitCode, words: str
) -> None:
    async def run() -> None:
        settings = [FakeSettings(), replace(FakeSettings(), **change)]  # type: ignore[arg-type]
        async with running_group(settings, is_awaited=False) as group:
            with pytest.raises(StartRefused, match=words) as caught:
                await wait_for_group(group)
            assert caught.value.exit_code == exit_code
            assert not any("Execute" in worker.calls for worker in group.workers)

    asyncio.run(run())


def test_two_ranks_on_one_gpu_are_refused() -> None:
    async def run() -> None:
        settings = [FakeSettings(device_uuid="GPU-1"), FakeSettings(device_uuid="GPU-1")]
        async with running_group(settings, is_awaited=False) as group:
            with pytest.raises(StartRefused, match="ranks 0 and 1 run on one GPU, GPU-1"):
                await wait_for_group(group)

    asyncio.run(run())


def test_a_worker_that_never_answers_ends_the_start() -> None:
    async def run() -> None:
        async with running_group([FakeSettings()], is_awaited=False) as probe:
            address = probe.workers[0].address
            probe.task.cancel()
        async with running_group(
            [FakeSettings()], False, workers=(address,), startup_timeout=0.5
        ) as group:
            with pytest.raises(StartRefused, match=f"rank 0 at {address} did not answer") as caught:
                await wait_for_group(group)
            assert caught.value.exit_code == ExitCode.GROUP_LOST

    asyncio.run(run())
