"""Every request ends in exactly one way, and resumes where it broke."""

import asyncio

import grpc
import pytest

from protos.lockstep.v1 import engine_pb2, generate_pb2
from tests.helpers.engine_harness import running_group
from tests.helpers.fake_worker import FakeSettings, expected_output


@pytest.mark.parametrize("num_resumed", [1, 4])
def test_resumed_output_is_not_sent_again_and_counts_towards_max_tokens(num_resumed: int) -> None:
    async def run() -> None:
        async with running_group() as group:
            whole = expected_output([1, 2], 9)
            group.submit(1, [1, 2], 9, resume=whole[:num_resumed])
            await group.heard.end_of(1)
            assert group.heard.tokens[1] == whole[num_resumed:]

    asyncio.run(run())


def test_a_call_that_broke_after_its_last_token_ends_at_once() -> None:
    async def run() -> None:
        async with running_group() as group:
            whole = expected_output([1, 2], 4)
            group.submit(1, [1, 2], 4, resume=whole)
            group.submit(2, [1, 2], 9, resume=whole[:2], stop_ids=[whole[1]])
            await group.heard.end_of(1, 2)
            assert group.heard.ended[1][0].finish_reason == generate_pb2.FINISH_REASON_LENGTH
            assert group.heard.ended[2][0].finish_reason == generate_pb2.FINISH_REASON_STOP
            assert group.heard.ended[2][0].stop_token_id == whole[1]
            assert group.heard.tokens == {1: [], 2: []}

    asyncio.run(run())


def test_a_released_request_is_ended_once_with_its_times_and_its_blocks_are_free() -> None:
    async def run() -> None:
        async with running_group(max_num_seqs=1) as group:
            group.submit(1, [1], 100)
            group.submit(2, [2], 100)
            await group.heard.until(lambda: len(group.heard.tokens.get(1, [])) > 2)
            for handle in (1, 2, 2, 77):  # running, waiting, crossed, unknown
                group.book.release(0, engine_pb2.Release(handle=handle, reason="cancelled"))
            group.leader.wake()
            await group.settled()
            assert sorted(group.heard.ended) == [1, 2]
            for handle in (1, 2):
                (ended,) = group.heard.ended[handle]
                assert ended.status_code == 0
                assert ended.finish_reason == generate_pb2.FINISH_REASON_UNSPECIFIED
            assert group.heard.ended[1][0].times.step_count > 2
            assert group.heard.ended[2][0].times.step_count == 0
            assert group.heard.ended[2][0].times.queue_seconds > 0
            assert group.metrics.request_success == {"cancelled": 2}
            assert group.book.num_in_flight == 0

    asyncio.run(run())


def test_a_deadline_that_passes_ends_a_request_whether_it_runs_or_waits_and_frees_its_slot() -> (
    None
):
    async def run() -> None:
        settings = FakeSettings()
        async with running_group([settings], max_num_seqs=1) as group:
            settings.is_stalled = True
            deadline = asyncio.get_running_loop().time() + 0.3
            group.submit(1, [1], 100, deadline=deadline)
            group.submit(2, [1], 100, deadline=deadline)
            group.submit(3, [1], 3)
            await group.heard.end_of(1, 2)
            for handle in (1, 2):
                (ended,) = group.heard.ended[handle]
                assert ended.status_code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
                assert "the deadline passed after 0 output tokens" in ended.status_message
                group.book.release(0, engine_pb2.Release(handle=handle, reason="deadline"))
            group.workers[0].release_stall()
            await group.heard.end_of(3)
            assert group.heard.tokens[3] == expected_output([1], 3)
            await group.settled()
            assert [len(group.heard.ended[handle]) for handle in (1, 2, 3)] == [1, 1, 1]
            assert group.metrics.request_success == {"deadline": 2, "length": 1}
            assert not group.metrics.requests_failed

    asyncio.run(run())


def test_a_released_request_is_not_ended_again_by_its_deadline() -> None:
    async def run() -> None:
        async with running_group() as group:
            deadline = asyncio.get_running_loop().time() + 60
            group.submit(1, [1], 200, deadline=deadline)
            group.book.release(0, engine_pb2.Release(handle=1, reason="deadline"))
            assert not group.book.tick(deadline + 1)
            group.leader.wake()
            await group.heard.end_of(1)
            await group.settled()
            assert len(group.heard.ended[1]) == 1
            assert group.metrics.requests_failed == {}

    asyncio.run(run())


def test_non_finite_logits_end_that_request_only() -> None:
    async def run() -> None:
        poisoned = expected_output([1, 2], 5)[3]
        settings = [FakeSettings(not_finite_token=poisoned) for _ in range(2)]
        async with running_group(settings) as group:
            group.submit(1, [1, 2], 9)
            group.submit(2, [7, 7], 9)
            await group.heard.end_of(1, 2)
            ended = group.heard.ended[1][0]
            assert ended.status_code == grpc.StatusCode.INTERNAL.value[0]
            assert "output token 4 were not finite" in ended.status_message
            assert group.heard.tokens[1] == expected_output([1, 2], 3)
            wanted = expected_output([7, 7], 9)
            assert poisoned not in wanted and group.heard.tokens[2] == wanted
            await group.settled()

    asyncio.run(run())


def test_log_probabilities_go_to_those_who_asked() -> None:
    async def run() -> None:
        async with running_group() as group:
            group.submit(1, [1, 2], 3)
            group.submit(2, [1, 2], 3, logprobs=2)
            group.submit(3, [1, 2], 3, logprobs=0)
            await group.heard.end_of(1, 2, 3)
            assert len(group.heard.logprobs) == 6
            alternatives = [list(one.top_token_ids) for one in group.heard.logprobs]
            assert sorted(alternatives) == [[]] * 3 + [[0, 1]] * 3
            assert all(one.logprob == -0.5 for one in group.heard.logprobs)

    asyncio.run(run())
