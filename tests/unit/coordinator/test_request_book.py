"""Admission, and that every request ends in exactly one way."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from coordinator.admission import ModelLimits, Refused, read_submit
from protos.lockstep.v1 import engine_pb2, generate_pb2
from tests.helpers.engine_harness import Harness, make_submit, running_group
from tests.helpers.fake_worker import FakeSettings, expected_output

INVALID = grpc.StatusCode.INVALID_ARGUMENT
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def refused(group: Harness, handle: int) -> engine_pb2.Ended:
    (ended,) = group.heard.ended[handle]
    assert handle not in group.heard.tokens
    return ended


async def refuse(group: Harness, change: Callable[[engine_pb2.Submit], Any]) -> engine_pb2.Ended:
    submit = make_submit(9, [1, 2, 3], 4)
    change(submit)
    group.book.submit(0, submit)
    group.leader.wake()
    await group.heard.end_of(9)
    return refused(group, 9)


def set_param(**values: Any) -> Callable[[engine_pb2.Submit], Any]:
    def change(submit: engine_pb2.Submit) -> None:
        for name, value in values.items():
            setattr(submit.sampling_params, name, value)

    return change


def set_ids(field: str, packed: bytes) -> Callable[[engine_pb2.Submit], Any]:
    return lambda submit: setattr(submit, field, packed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_ids("prompt_ids", b""), "the prompt is empty"),
        (set_ids("prompt_ids", b"\0\0\0"), "prompt holds 3 bytes"),
        (
            set_ids("prompt_ids", b"\xe8\x03\0\0"),
            r"prompt holds ids \[1000\]; ids are in \[0, 1000",
        ),
        (set_ids("prompt_ids", b"\xff\xff\xff\xff"), r"prompt holds ids \[-1\]"),
        (set_ids("resume_output_ids", b"\xe8\x03\0\0"), "resume_output_ids holds ids"),
        (set_ids("stop_ids", b"\xe8\x03\0\0"), "stop_ids holds ids"),
        (set_ids("stop_ids", bytes(4 * 17)), "17 stop ids; at most 16"),
        (set_param(max_tokens=0), "max_tokens is 0"),
        (set_param(max_tokens=250), r"make 253 tokens; the context holds 252"),
        (set_param(temperature=float("nan")), "temperature is nan"),
        (set_param(temperature=-1.0), "temperature is -1; it must be 0 to 100"),
        (set_param(top_p=-0.5), "top_p is -0.5"),
        (set_param(top_p=1.5), "top_p is 1.5"),
        (set_param(min_p=1.5), "min_p is 1.5"),
        (set_param(top_k=-1), "top_k is -1"),
        (set_param(min_tokens=-1), "min_tokens is -1"),
        (set_param(repetition_penalty=0.0), "repetition_penalty is 0;"),
        (set_param(repetition_penalty=1e-7), "repetition_penalty is 1e-07"),
        (set_param(frequency_penalty=-2.5), "frequency_penalty is -2.5"),
        (set_param(presence_penalty=float("inf")), "presence_penalty is inf"),
        (set_param(logprobs=21), "logprobs 21 is above 20"),
        (
            lambda submit: setattr(submit, "priority", 101),
            "priority is 101; it must be -100 to 100",
        ),
        (lambda submit: setattr(submit, "priority", -101), "priority is -101; it must be -100"),
    ],
)
def test_what_must_not_reach_the_ranks_is_refused_by_name(
    change: Callable[[engine_pb2.Submit], Any], words: str
) -> None:
    async def run() -> None:
        async with running_group([FakeSettings()]) as group:
            ended = await refuse(group, change)
            assert ended.status_code == INVALID.value[0]
            assert re.search(words, ended.status_message), ended.status_message
            assert group.metrics.requests_rejected["invalid_argument"] == 1
            group.submit(1, [1, 2], 3)
            await group.heard.end_of(1)
            assert group.heard.tokens[1] == expected_output([1, 2], 3)

    asyncio.run(run())


def test_a_request_that_could_never_fit_the_cache_is_refused_naming_the_numbers() -> None:
    # The served context is lowered to what the cache holds, so only a wider context shows this.
    async def run() -> None:
        limits = ModelLimits(max_model_len=100, vocab_size=1000, num_blocks=5, block_size=4)
        read_submit(make_submit(1, [1] * 10, 7), 0, limits)
        with pytest.raises(Refused, match="18 tokens need 5 KV blocks of 4, there are 4"):
            read_submit(make_submit(1, [1] * 10, 8), 0, limits)

    asyncio.run(run())


def test_a_full_queue_refuses_with_a_retry_hint_and_keeps_the_others() -> None:
    async def run() -> None:
        async with running_group(max_num_seqs=1, max_queue_requests=2) as group:
            group.submit(1, [1], 60)
            await group.heard.until(lambda: bool(group.heard.tokens.get(1)))
            for handle in (2, 3, 4):
                group.submit(handle, [1], 60)
            await group.heard.end_of(4)
            ended = refused(group, 4)
            assert ended.status_code == EXHAUSTED.value[0]
            assert ended.retry_after_seconds > 0
            assert "the queue is full: 2 requests wait" in ended.status_message
            await group.heard.end_of(1, 2, 3)
            assert group.heard.tokens[3] == expected_output([1], 60)
            assert group.metrics.requests_rejected == {"queue_full": 1}

    asyncio.run(run())


def test_a_name_in_flight_is_refused_and_free_again_afterwards() -> None:
    async def run() -> None:
        async with running_group() as group:
            group.submit(1, [1], 30, request_id="same")
            group.submit(2, [1], 30, request_id="same")
            await group.heard.end_of(1, 2)
            ended = refused(group, 2)
            assert ended.status_code == INVALID.value[0]
            assert "request_id is 'same'" in ended.status_message
            group.submit(3, [1], 3, request_id="same")
            await group.heard.end_of(3)
            assert group.heard.tokens[3] == expected_output([1], 3)

    asyncio.run(run())


def test_samples_of_one_call_share_its_name_and_an_abort_ends_them_all() -> None:
    async def run() -> None:
        async with running_group(max_num_seqs=2) as group:
            for handle in (4, 5, 6):
                group.submit(handle, [1], 200, request_id="same", group=4, seed=handle)
            group.submit(7, [2], 4, request_id="other")
            group.submit(8, [1], 200, request_id="same", group=8)  # another call
            other = make_submit(9, [1], 200, request_id="same", group=4)
            group.book.submit(1, other)  # the same numbers, but of another frontend
            assert group.metrics.requests_rejected == {"duplicate_request_id": 2}
            await group.heard.until(lambda: bool(group.heard.tokens.get(4)))
            group.book.abort(0, engine_pb2.AbortByName(query=1, request_id="same"))
            group.leader.wake()
            await group.heard.end_of(4, 5, 6, 7)
            for handle in (4, 5, 6):
                (ended,) = group.heard.ended[handle]
                assert ended.finish_reason == generate_pb2.FINISH_REASON_ABORTED
            assert group.heard.tokens[7] == expected_output([2], 4)
            assert [one.was_active for one in group.heard.outcomes] == [True]
            group.submit(10, [1], 2, request_id="same")  # the name is free
            await group.heard.end_of(10)
            assert group.heard.tokens[10] == expected_output([1], 2)
            await group.settled()

    asyncio.run(run())


def test_a_name_stays_taken_until_its_last_sample_has_ended() -> None:
    async def run() -> None:
        async with running_group() as group:
            group.submit(4, [1], 2, request_id="same", group=4)
            group.submit(5, [1], 100, request_id="same", group=4)
            await group.heard.end_of(4)
            group.submit(6, [1], 2, request_id="same")
            assert group.metrics.requests_rejected == {"duplicate_request_id": 1}
            group.submit(7, [1], 2, request_id="same", group=4)
            await group.heard.end_of(5, 7)
            assert group.heard.tokens[7] == expected_output([1], 2)

    asyncio.run(run())


def test_acceptance_is_told_before_any_token() -> None:
    async def run() -> None:
        settings = FakeSettings()
        async with running_group([settings]) as group:
            settings.is_stalled = True
            group.submit(1, [1], 3)
            await group.heard.until(lambda: 1 in group.heard.tokens)
            assert group.heard.tokens[1] == []
            group.workers[0].release_stall()
            await group.heard.end_of(1)

    asyncio.run(run())


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
            assert group.metrics.requests_failed == {"deadline_exceeded": 2}
            assert group.metrics.request_success == {"length": 1}

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


def test_times_tell_where_a_request_was() -> None:
    async def run() -> None:
        async with running_group(max_batch_tokens=8, max_num_seqs=2) as group:
            group.submit(1, [1] * 30, 10)
            await group.heard.end_of(1)
            group.submit(2, [2], 4, resume=expected_output([2], 2))
            await group.heard.end_of(2)
            times = group.heard.ended[1][0].times
            # The first token comes with the last of 4 chunks.
            assert times.step_count == 3 + 10
            assert times.queue_seconds >= 0
            assert times.prefill_seconds > 0 and times.decode_seconds > 0
            assert times.epoch == group.heard.states[-1].server.epoch
            assert group.heard.ended[2][0].times.step_count == 2

    asyncio.run(run())


def test_preemptions_are_counted_in_the_times() -> None:
    async def run() -> None:
        async with running_group([FakeSettings(num_blocks=13)]) as group:
            for handle in range(1, 5):
                group.submit(handle, [handle] * 6, 20)
            await group.heard.end_of(1, 2, 3, 4)
            counts = [group.heard.ended[h][0].times.preemption_count for h in range(1, 5)]
            assert sum(counts) == group.metrics.preemptions > 0
            assert counts[0] == 0, "the first by precedence never loses its place"
            for handle in range(1, 5):
                times = group.heard.ended[handle][0].times
                assert times.step_count >= 20

    asyncio.run(run())


def test_what_waits_and_who_has_no_client_is_measured() -> None:
    async def run() -> None:
        settings = FakeSettings()
        async with running_group([settings], max_num_seqs=1) as group:
            settings.is_stalled = True
            group.submit(1, [1], 9)
            await group.heard.until(lambda: group.metrics.num_requests_running == 1)
            group.submit(2, [1] * 5, 9, tenant="a")
            group.submit(3, [1] * 6, 9, tenant="b")
            group.book.tick(asyncio.get_running_loop().time())
            assert group.metrics.queue_prompt_tokens == 11
            assert group.metrics.num_tenants_waiting == 2
            group.book.alive(0, 3)
            assert group.metrics.requests_without_client == 0
            group.book.alive(0, 2)
            assert group.metrics.requests_without_client == 1
            group.workers[0].release_stall()
            await group.heard.end_of(1, 2, 3)
            group.book.alive(0, 0)
            assert group.metrics.requests_without_client == 0
            group.book.tick(asyncio.get_running_loop().time())
            assert group.metrics.queue_prompt_tokens == group.metrics.num_tenants_waiting == 0
            assert group.metrics.predicted_ttft > 0
            assert group.metrics.request_queue_time.count == 3

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


def test_requests_are_measured() -> None:
    async def run() -> None:
        async with running_group() as group:
            group.submit(1, [1, 2, 3], 5)
            group.submit(2, [1], 2)
            await group.heard.end_of(1, 2)
            metrics = group.metrics
            assert metrics.prompt_tokens == 4
            assert metrics.generation_tokens == 7
            assert metrics.time_to_first_token.count == 2
            assert metrics.inter_token_latency.count == 5
            assert metrics.e2e_latency.count == 2
            assert metrics.request_success == {"length": 2}
            assert 0 < metrics.time_to_first_token.sum < 10

    asyncio.run(run())


def test_names_are_a_tenants_own_and_so_is_abort() -> None:
    async def run() -> None:
        async with running_group(max_num_seqs=4) as group:
            for handle, tenant in ((4, "a"), (5, "b"), (6, "")):
                group.submit(handle, [1], 200, request_id="same", tenant=tenant)
            assert not group.metrics.requests_rejected
            await group.heard.until(lambda: all(group.heard.tokens.get(h) for h in (4, 5, 6)))
            for query, tenant in ((1, "c"), (2, "b")):
                abort = engine_pb2.AbortByName(query=query, request_id="same", tenant=tenant)
                group.book.abort(0, abort)
            group.leader.wake()
            await group.heard.end_of(5)
            assert not group.heard.ended.get(4) and not group.heard.ended.get(6)
            group.submit(7, [1], 4, request_id="same", tenant="b")  # free again
            await group.heard.end_of(7)
            (refusal,) = (await refuse(group, _named("same", "a")),)
            assert (refusal.field, refusal.status_code) == ("request_id", INVALID.value[0])
            for tenant in ("a", ""):
                abort = engine_pb2.AbortByName(query=9, request_id="same", tenant=tenant)
                group.book.abort(0, abort)
            group.leader.wake()
            await group.heard.end_of(4, 6)

    asyncio.run(run())


def _named(request_id: str, tenant: str) -> Callable[[engine_pb2.Submit], Any]:
    def change(submit: engine_pb2.Submit) -> None:
        submit.request_id, submit.tenant = request_id, tenant

    return change
