"""Where the time went: what trailing metadata say, when the engine tells, late or never."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.frontend.tokenizer import Tokenizer
from coordinator.frontend.trailing_metadata import times_metadata
from protos.lockstep.v1 import engine_pb2, generate_pb2
from tests.unit.coordinator.frontend.fake_engine import (
    Served,
    serving,
    within,
)

TIMES = engine_pb2.RequestTimes(
    queue_seconds=0.0125,
    prefill_seconds=0.5,
    decode_seconds=2.0,
    comm_share=0.25,
    step_count=7,
    preemption_count=1,
    cached_token_count=48,
    epoch=3,
)
SHOWN = {
    "lockstep-queue-ms": "12.500",
    "lockstep-prefill-ms": "500.000",
    "lockstep-decode-ms": "2000.000",
    "lockstep-comm-share": "0.2500",
    "lockstep-steps": "7",
    "lockstep-preemptions": "1",
    "lockstep-cached-tokens": "48",
    "lockstep-epoch": "3",
}


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


def ours(metadata: Any) -> dict[str, str]:
    """Our keys, less the frontend's own time, which is checked and taken out."""
    found = {key: str(value) for key, value in metadata if key.startswith("lockstep-")}
    assert float(found.pop("lockstep-frontend-ms")) >= 0
    return found


def test_share_that_was_not_measured_is_left_out() -> None:
    times = engine_pb2.RequestTimes()
    times.CopyFrom(TIMES)
    times.comm_share = -1.0
    shown = dict(times_metadata(times))
    assert shown == {key: value for key, value in SHOWN.items() if key != "lockstep-comm-share"}


def test_stream_ends_with_its_times_and_usage_counts_cached_tokens(model: Path) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(request())
        submit = await served.engine.next_submit()
        served.engine.accept(submit.handle)
        served.engine.end(submit.handle, times=TIMES)
        events = await collect(call)
        assert events[-1].finished.usage.cached_token_count == 48
        assert ours(await call.trailing_metadata()) == SHOWN

    run(model, script)


def test_unary_call_ends_with_its_times(model: Path) -> None:
    async def script(served: Served) -> None:
        call = served.stub.GenerateUnary(generate_pb2.GenerateUnaryRequest(request=request()))
        submit = await served.engine.next_submit()
        served.engine.end(submit.handle, times=TIMES)
        await within(call)
        assert ours(await call.trailing_metadata()) == SHOWN

    run(model, script)


def test_error_ends_with_its_times_and_its_retry_delay(model: Path) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(request())
        submit = await served.engine.next_submit()
        code = grpc.StatusCode.UNAVAILABLE
        served.engine.refuse(submit.handle, code, "rank 1 lost", 1.0, times=TIMES)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(call)
        metadata = tuple(caught.value.trailing_metadata())
        assert ours(metadata) == SHOWN
        assert ("grpc-retry-pushback-ms", "1000") in metadata

    run(model, script)


def test_times_are_sample_0s_or_the_failed_ones(model: Path) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(request(n=2))
        first, second = [await served.engine.next_submit() for _ in range(2)]
        served.engine.end(first.handle, times=TIMES)
        served.engine.end(second.handle, times=engine_pb2.RequestTimes(step_count=99))
        await collect(call)
        assert ours(await call.trailing_metadata())["lockstep-steps"] == "7"
        call = served.stub.Generate(request(n=2))
        first, second = [await served.engine.next_submit() for _ in range(2)]
        served.engine.end(first.handle, times=TIMES)
        times = engine_pb2.RequestTimes(step_count=99)
        code = grpc.StatusCode.INTERNAL
        served.engine.refuse(second.handle, code, "not finite", times=times)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(call)
        assert ours(caught.value.trailing_metadata())["lockstep-steps"] == "99"

    run(model, script)


def test_stop_text_finishes_at_once_and_the_call_waits_for_its_times(
    model: Path, encode: Any
) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(request(stop=["END"]))
        submit = await served.engine.next_submit()
        served.engine.send_outputs({submit.handle: encode("oneEND")})
        release = await served.engine.next_release()
        events = aiter(call)
        seen = [await within(anext(events)) for _ in range(3)]
        assert seen[-1].finished.stop == "END"  # the engine has not answered
        served.engine.send_outputs({submit.handle: encode("late")})
        served.engine.answer_release(release, TIMES)
        assert await collect(events) == []
        assert ours(await call.trailing_metadata()) == SHOWN

    run(model, script)


def test_unary_answer_after_a_stop_text_counts_cached_tokens(model: Path, encode: Any) -> None:
    async def script(served: Served) -> None:
        message = generate_pb2.GenerateUnaryRequest(request=request(stop=["END"]))
        call = served.stub.GenerateUnary(message)
        submit = await served.engine.next_submit()
        served.engine.send_outputs({submit.handle: encode("oneEND")})
        served.engine.answer_release(await served.engine.next_release(), TIMES)
        response = await within(call)
        assert response.finished.usage.cached_token_count == 48
        assert response.output.text == "one"

    run(model, script)


def test_engine_that_does_not_answer_a_release_costs_the_times_and_a_bounded_wait(
    model: Path, encode: Any
) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(request(stop=["END"]))
        submit = await served.engine.next_submit()
        served.engine.send_outputs({submit.handle: encode("oneEND")})
        events = await collect(call)
        assert events[-1].finished.stop == "END"
        assert ours(await call.trailing_metadata()) == {}

    run(model, script)


def test_scheduling_fields_and_deadline_reach_the_engine(model: Path) -> None:
    async def script(served: Served) -> None:
        plain = request()
        served.stub.Generate(plain)
        submit = await served.engine.next_submit()
        assert (submit.priority, submit.tenant, submit.deadline) == (0, "", 0.0)
        assert submit.use_prefix_cache
        telling = request()
        telling.priority, telling.tenant, telling.use_prefix_cache = -7, "acme", False
        before = time.monotonic()
        served.stub.Generate(telling, timeout=50.0)
        submit = await served.engine.next_submit()
        assert (submit.priority, submit.tenant) == (-7, "acme")
        assert not submit.use_prefix_cache
        # The wire carries the deadline as time left, rounded up by gRPC.
        assert before + 49.0 < submit.deadline < time.monotonic() + 52.0
        assert before <= submit.arrival_time < submit.deadline

    run(model, script)
