"""Which requests the book takes, and that what it refuses harms no other."""

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
            r"prompt holds id 1000; ids are in \[0, 1000",
        ),
        (set_ids("prompt_ids", b"\xff\xff\xff\xff"), r"prompt holds id -1;"),
        (set_ids("resume_output_ids", b"\xe8\x03\0\0"), "resume_output_ids holds id 1000"),
        (set_ids("stop_ids", b"\xe8\x03\0\0"), "stop_token_ids holds id 1000"),
        (set_ids("stop_ids", bytes(4 * 17)), "17 stop ids; at most 16"),
        (set_param(max_tokens=0), "max_tokens is 0"),
        (set_param(max_tokens=250), r"make 253 tokens; the context holds 252"),
        (set_param(temperature=float("nan")), "temperature is nan"),
        (set_param(temperature=-1.0), "temperature is -1; it must be at least 0 and at most 100"),
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
