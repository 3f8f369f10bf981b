"""Several samples of one call: one stream of events, one end for all that goes wrong."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.frontend.tokenizer import Tokenizer
from protos.lockstep.v1 import engine_pb2, generate_pb2
from tests.unit.coordinator.frontend.fake_engine import (
    Served,
    serving,
    within,
)


@pytest.fixture(scope="module")
def encode(model: Path) -> Callable[[str], list[int]]:
    return Tokenizer.from_dir(model).encode


def run(model: Path, script: Callable[[Served], Awaitable[None]]) -> None:
    async def main() -> None:
        async with serving(model) as served:
            await script(served)

    asyncio.run(main())


def request(**params: Any) -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(
        text="hello", sampling_params=generate_pb2.SamplingParams(**params)
    )


async def collect(call: Any) -> list[generate_pb2.GenerateResponse]:
    async with asyncio.timeout(20.0):
        return [event async for event in call]


async def submits_of(served: Served, count: int) -> list[engine_pb2.Submit]:
    return [await served.engine.next_submit() for _ in range(count)]


def accept(served: Served, submits: list[engine_pb2.Submit]) -> None:
    for submit in submits:
        served.engine.accept(submit.handle)


def text_of(events: list[generate_pb2.GenerateResponse], sample_index: int) -> str:
    deltas = (event.delta for event in events if event.HasField("delta"))
    return "".join(delta.text for delta in deltas if delta.sample_index == sample_index)


def test_every_sample_is_a_submit_with_its_own_seed_and_one_group(model: Path) -> None:
    async def script(served: Served) -> None:
        served.stub.Generate(request(n=3, seed=2**63 - 2))
        submits = await submits_of(served, 3)
        seeds = [submit.sampling_params.seed for submit in submits]
        assert seeds == [2**63 - 2, 2**63 - 1, -(2**63)]
        assert len({submit.request_id for submit in submits}) == 1
        assert len({submit.handle for submit in submits}) == 3
        assert {submit.group for submit in submits} == {submits[0].handle}
        assert len({submit.prompt_ids for submit in submits}) == 1

    run(model, script)


def test_samples_share_a_stream_and_each_finishes_once(model: Path, encode: Any) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(request(n=3))
        submits = await submits_of(served, 3)
        accept(served, submits)
        texts = ("café", "two", "and three")
        for submit, text in zip(submits, texts, strict=True):
            for token_id in encode(text):
                served.engine.send_outputs({submit.handle: [token_id]})
        for submit in reversed(submits):
            served.engine.end(submit.handle)
        events = await collect(call)
        assert [event.HasField("started") for event in events].count(True) == 1
        assert events[0].HasField("started") and events[-1].HasField("finished")
        assert [text_of(events, index) for index in range(3)] == list(texts)
        finished = [event.finished for event in events if event.HasField("finished")]
        assert sorted(one.sample_index for one in finished) == [0, 1, 2]
        counts = {one.sample_index: one.usage.output_token_count for one in finished}
        assert counts == {index: len(encode(text)) for index, text in enumerate(texts)}
        assert {one.usage.prompt_token_count for one in finished} == {len(encode("hello"))}

    run(model, script)


def test_started_waits_for_the_last_sample_and_holds_nothing_back_for_good(
    model: Path, encode: Any
) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(request(n=2))
        first, second = await submits_of(served, 2)
        served.engine.send_outputs({first.handle: encode("early")})
        reading = asyncio.create_task(collect(call))
        done, _ = await asyncio.wait({reading}, timeout=0.2)
        assert not done
        served.engine.accept(second.handle)
        for submit in (first, second):
            served.engine.end(submit.handle)
        events = await within(reading)
        assert events[0].HasField("started")
        assert text_of(events, 0) == "early"

    run(model, script)


def test_stop_text_ends_its_sample_alone(model: Path, encode: Any) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(request(n=2, stop=["END"]))
        stopped, running = await submits_of(served, 2)
        accept(served, [stopped, running])
        served.engine.send_outputs({stopped.handle: encode("oneENDtwo")})
        release = await served.engine.next_release()
        assert (release.handle, release.reason) == (stopped.handle, "stop")
        served.engine.answer_release(release)
        served.engine.send_outputs({running.handle: encode("going on")})
        served.engine.end(running.handle)
        events = await collect(call)
        assert (text_of(events, 0), text_of(events, 1)) == ("one", "going on"), events
        finished = [event.finished for event in events if event.HasField("finished")]
        assert [(one.sample_index, one.stop) for one in finished] == [(0, "END"), (1, "")]
        assert served.engine.releases.empty()

    run(model, script)


def test_refused_sample_is_the_only_answer_and_releases_the_others(model: Path) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(request(n=3))
        submits = await submits_of(served, 3)
        accept(served, submits[:2])
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        served.engine.refuse(submits[2].handle, code, "the queue is full", 1.5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(call)
        assert (caught.value.code(), caught.value.details()) == (code, "the queue is full")
        assert ("grpc-retry-pushback-ms", "1500") in tuple(caught.value.trailing_metadata())
        released = {(await served.engine.next_release()).handle for _ in range(2)}
        assert released == {submits[0].handle, submits[1].handle}

    run(model, script)


def test_sample_that_fails_later_ends_the_call_after_what_came(model: Path, encode: Any) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(request(n=2))
        fails, others = await submits_of(served, 2)
        accept(served, [fails, others])
        served.engine.send_outputs({others.handle: encode("here")})
        events = aiter(call)
        seen = [await within(anext(events)) for _ in range(2)]
        assert text_of(seen, 1) == "here"
        served.engine.refuse(fails.handle, grpc.StatusCode.INTERNAL, "logits were not finite")
        with pytest.raises(grpc.aio.AioRpcError, match="not finite"):
            await collect(events)
        assert (await served.engine.next_release()).handle == others.handle

    run(model, script)


def test_cancelled_call_releases_every_sample(model: Path) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(request(n=4))
        submits = await submits_of(served, 4)
        call.cancel()
        releases = [await served.engine.next_release() for _ in submits]
        assert {release.handle for release in releases} == {s.handle for s in submits}
        assert {release.reason for release in releases} == {"cancelled"}

    run(model, script)


def test_unary_answer_has_sample_0_and_the_further_samples(model: Path, encode: Any) -> None:
    async def script(served: Served) -> None:
        message = generate_pb2.GenerateUnaryRequest(request=request(n=3))
        call = served.stub.GenerateUnary(message)
        submits = await submits_of(served, 3)
        accept(served, submits)
        for index, submit in enumerate(submits):
            served.engine.send_outputs({submit.handle: encode(f"text {index}")})
        for index, submit in reversed(list(enumerate(submits))):
            times = engine_pb2.RequestTimes(cached_token_count=index + 1)
            served.engine.end(submit.handle, times=times)
        response = await within(call)
        samples = [response, *response.further_samples]
        assert [sample.output.text for sample in samples] == ["text 0", "text 1", "text 2"]
        assert [sample.output.sample_index for sample in samples] == [0, 1, 2]
        assert [sample.finished.sample_index for sample in samples] == [0, 1, 2]
        assert [s.finished.usage.cached_token_count for s in samples] == [1, 2, 3]

    run(model, script)
