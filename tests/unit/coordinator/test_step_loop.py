"""The step loop against ranks that follow docs/protocol.md over real gRPC."""

import asyncio
import random

import pytest

from protos.lockstep.v1 import engine_pb2, generate_pb2
from tests.helpers.engine_harness import running_group
from tests.helpers.fake_worker import FakeSettings, expected_output

STOP = generate_pb2.FINISH_REASON_STOP
LENGTH = generate_pb2.FINISH_REASON_LENGTH
ABORTED = generate_pb2.FINISH_REASON_ABORTED


def test_one_request_gets_the_tokens_of_its_positions() -> None:
    async def run() -> None:
        async with running_group() as group:
            group.submit(1, [5, 6, 7], 9)
            await group.heard.end_of(1)
            assert group.heard.tokens[1] == expected_output([5, 6, 7], 9)
            assert [ended.finish_reason for ended in group.heard.ended[1]] == [LENGTH]
            await group.settled()

    asyncio.run(run())


@pytest.mark.parametrize("num_blocks", [12, 64])
def test_many_requests_of_mixed_length_each_get_the_tokens_they_get_alone(num_blocks: int) -> None:
    async def run() -> None:
        draw = random.Random(num_blocks)
        settings = [FakeSettings(num_blocks=num_blocks) for _ in range(2)]
        async with running_group(settings, max_batch_tokens=16) as group:
            wanted = {}
            for handle in range(1, 41):
                prompt = [draw.randrange(1000) for _ in range(draw.randint(1, 24))]
                max_tokens = draw.randint(1, 44 - len(prompt) - 1)
                wanted[handle] = expected_output(prompt, max_tokens)
                group.submit(handle, prompt, max_tokens)
            await group.heard.end_of(*wanted)
            assert group.heard.tokens == wanted
            assert all(len(ended) == 1 for ended in group.heard.ended.values())
            assert (group.metrics.preemptions > 0) == (num_blocks == 12)
            await group.settled()

    asyncio.run(run())


def test_stop_id_ends_a_request_and_what_ran_ahead_is_dropped() -> None:
    async def run() -> None:
        async with running_group() as group:
            stop_id = expected_output([1, 2], 50)[3]
            group.submit(1, [1, 2], 50, stop_ids=[stop_id])
            await group.heard.end_of(1)
            wanted = expected_output([1, 2], 50, (stop_id,))
            assert group.heard.tokens[1] == wanted
            ended = group.heard.ended[1][0]
            assert (ended.finish_reason, ended.stop_token_id) == (STOP, stop_id)
            await group.settled()

    asyncio.run(run())


def test_every_decoding_stream_gets_a_token_in_each_step_of_a_long_prefill() -> None:
    async def run() -> None:
        async with running_group([FakeSettings(num_blocks=128)] * 1, max_batch_tokens=8) as group:
            group.submit(1, [1], 60)
            group.submit(2, [2], 60)
            await group.heard.until(lambda: len(group.heard.tokens.get(2, [])) > 2)
            first = len(group.workers[0].commands)
            group.submit(3, list(range(100)), 2)
            await group.heard.end_of(3)
            with_chunks = [
                delta
                for command in group.workers[0].commands[first:]
                if (delta := _delta(command.delta)).chunks
            ]
            assert len(with_chunks) >= 100 / 6
            assert all(delta.row_count == 2 for delta in with_chunks)

    asyncio.run(run())


def _delta(packed: bytes):  # type: ignore[no-untyped-def]
    from protos.lockstep.v1 import worker_pb2

    return worker_pb2.TableDelta.FromString(packed)


def test_commands_run_ahead_of_results() -> None:
    async def run() -> None:
        settings = [FakeSettings(), FakeSettings()]
        async with running_group(settings) as group:
            for one in settings:
                one.is_stalled = True
            group.submit(1, [1, 2, 3], 20)
            batch = group.book.batch
            assert batch is not None
            async with asyncio.timeout(5):
                while batch.num_unreported < 2:
                    await asyncio.sleep(0)
            for worker in group.workers:
                worker.release_stall()
            await group.heard.end_of(1)
            assert group.heard.tokens[1] == expected_output([1, 2, 3], 20)

    asyncio.run(run())


def test_abort_by_name_ends_a_waiting_and_a_running_request() -> None:
    async def run() -> None:
        async with running_group(max_num_seqs=1, max_batch_tokens=8) as group:
            group.submit(1, [1], 100, request_id="runs")
            group.submit(2, [2], 100, request_id="waits")
            await group.heard.until(lambda: len(group.heard.tokens.get(1, [])) > 1)
            for query, name in enumerate(["waits", "runs", "unknown"]):
                group.book.abort(0, engine_pb2.AbortByName(query=query, request_id=name))
            group.leader.wake()
            await group.heard.until(lambda: len(group.heard.outcomes) == 3)
            assert [outcome.was_active for outcome in group.heard.outcomes] == [True, True, False]
            assert group.heard.ended[1][0].finish_reason == ABORTED
            assert group.heard.ended[2][0].finish_reason == ABORTED
            await group.settled()

    asyncio.run(run())
