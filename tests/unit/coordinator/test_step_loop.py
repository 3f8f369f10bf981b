"""The step loop against ranks that follow docs/protocol.md over real gRPC."""

import asyncio
import random
from typing import Any

import pytest

from protos.lockstep.v1 import engine_pb2, generate_pb2
from tests.helpers.engine_harness import Harness, make_submit, running_group
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


def _counts(group: Harness) -> list[int]:
    return [command.step_count for command in group.workers[0].commands if command.step_count]


def test_quick_steps_are_granted_several_at_a_time_once_nobody_waits() -> None:
    async def run() -> None:
        settings = [FakeSettings(num_blocks=128, step_micros=500) for _ in range(2)]
        async with running_group(settings) as group:
            prompts = {1: [5, 6, 7], 2: [8]}
            for handle, prompt in prompts.items():
                group.submit(handle, prompt, 200)
            await group.heard.end_of(*prompts)
            for handle, prompt in prompts.items():
                assert group.heard.tokens[handle] == expected_output(prompt, 200)
            counts = _counts(group)
            # More on a machine so slow that the ranks run dry.
            assert counts[0] == 1 and 3 <= max(counts) <= 8
            # 199 positions after the first token, and never a step that no row has a position for.
            assert sum(counts) == 200
            await group.settled()

    asyncio.run(run())


def test_one_step_is_granted_at_a_time_while_a_request_could_begin() -> None:
    async def run() -> None:
        # Room for one of the two requests: the other waits for blocks, not for a slot.
        settings = [FakeSettings(num_blocks=30, step_micros=500)]
        async with running_group(settings, max_num_seqs=2) as group:
            group.submit(1, [5, 6, 7], 100)
            group.submit(2, [*range(80)], 30)
            await group.heard.end_of(1)
            assert max(_counts(group)[:90]) == 1
            await group.heard.end_of(2)
            assert max(_counts(group)) > 1
            await group.settled()

    asyncio.run(run())


def test_grants_stay_long_while_those_who_wait_have_no_slot_to_get() -> None:
    async def run() -> None:
        settings = [FakeSettings(num_blocks=128, step_micros=500)]
        async with running_group(settings, max_num_seqs=1) as group:
            group.submit(1, [5, 6, 7], 100)
            group.submit(2, [5, 6, 7], 100)
            await group.heard.end_of(1)
            assert max(_counts(group)[:90]) > 1
            await group.heard.end_of(2)
            assert max(_counts(group)) > 1
            await group.settled()

    asyncio.run(run())


def test_a_stop_in_the_middle_of_a_grant_drops_the_rest_of_it() -> None:
    async def run() -> None:
        settings = [FakeSettings(num_blocks=128, step_micros=200) for _ in range(2)]
        async with running_group(settings) as group:
            alone = expected_output([1, 2], 90)
            group.submit(1, [1, 2], 90, stop_ids=[alone[70]])
            group.submit(2, [3], 90)
            await group.heard.end_of(1, 2)
            assert group.heard.tokens[1] == expected_output([1, 2], 90, (alone[70],))
            assert group.heard.tokens[2] == expected_output([3], 90)
            assert max(_counts(group)) > 1
            await group.settled()

    asyncio.run(run())


def test_the_clocks_of_the_ranks_are_measured() -> None:
    async def run() -> None:
        async with running_group() as group:
            group.submit(1, [1, 2], 20)
            await group.heard.until(lambda: 1 in group.metrics.command_arrival_skew)
            await group.heard.end_of(1)
            assert set(group.metrics.worker_idle_seconds) == {0, 1}
            assert set(group.metrics.command_arrival_skew) == {1}

    asyncio.run(run())


def test_samples_of_one_call_and_requests_of_one_tenant_share_what_others_do_not() -> None:
    async def run() -> None:
        settings = [FakeSettings(num_blocks=128) for _ in range(2)]
        async with running_group(settings) as group:
            prompt = list(range(20))
            calls: dict[int, dict[str, Any]] = {
                1: {"tenant": "a", "use_prefix_cache": True},
                2: {"tenant": "b", "use_prefix_cache": True},
                3: {"group": 3},
                4: {"group": 3},
            }
            for handle, fields in calls.items():
                submit = make_submit(handle, prompt, 5, request_id=f"request-{handle}")
                for name, value in fields.items():
                    setattr(submit, name, value)
                group.book.submit(0, submit)
                group.leader.wake()
                if handle != 3:
                    await group.heard.end_of(handle)
            await group.heard.end_of(1, 2, 3, 4)
            assert set(map(tuple, group.heard.tokens.values())) == {
                tuple(expected_output(prompt, 5))
            }
            cached = [
                opened.cached_len
                for command in group.workers[0].commands
                for opened in _delta(command.delta).opened_slots
            ]
            assert cached == [0, 0, 0, 16]
            again = make_submit(5, prompt, 5)
            again.tenant, again.use_prefix_cache = "b", True
            group.book.submit(0, again)
            group.leader.wake()
            await group.heard.end_of(5)
            assert (group.metrics.prefix_cache_queries, group.metrics.prefix_cache_hits) == (
                100,
                32,
            )
            await group.settled()

    asyncio.run(run())
