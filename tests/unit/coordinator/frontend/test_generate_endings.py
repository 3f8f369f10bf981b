"""How calls end before their time, and that what they held is released."""

from pathlib import Path
from typing import Any

import grpc

from protos.lockstep.v1 import engine_pb2, generate_pb2
from tests.unit.coordinator.frontend.fake_engine import (
    Served,
    within,
)
from tests.unit.coordinator.frontend.generate_calls import (
    all_events,
    failure,
    kinds,
    run,
    text_request,
)


def test_dropped_call_is_released_as_cancelled(model: Path, encode: Any) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(text_request())
        submit = await served.engine.next_submit()
        served.engine.send_outputs({submit.handle: encode("he")})
        await within(anext(aiter(call)))
        call.cancel()
        release = await served.engine.next_release()
        assert (release.handle, release.reason) == (submit.handle, "cancelled")

    run(model, script)


def test_dropped_unary_call_is_released_as_cancelled(model: Path) -> None:
    async def script(served: Served) -> None:
        call = served.stub.GenerateUnary(generate_pb2.GenerateUnaryRequest(request=text_request()))
        submit = await served.engine.next_submit()
        call.cancel()
        assert (await served.engine.next_release()).handle == submit.handle

    run(model, script)


def test_passed_deadline_is_released_as_deadline(model: Path) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(text_request(), timeout=0.5)
        submit = await served.engine.next_submit()
        error = await failure(all_events(call))
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        release = await served.engine.next_release()
        assert (release.handle, release.reason) == (submit.handle, "deadline")

    run(model, script)


def test_lost_client_connection_releases_its_requests(model: Path) -> None:
    async def script(served: Served) -> None:
        channel = grpc.aio.insecure_channel(
            f"127.0.0.1:{served.engine.port}", options=[("grpc.use_local_subchannel_pool", 1)]
        )
        method = channel.unary_stream(
            "/lockstep.v1.GenerateService/Generate",
            request_serializer=generate_pb2.GenerateRequest.SerializeToString,
        )
        call = method(text_request())
        submit = await served.engine.next_submit()
        await channel.close()
        assert (await served.engine.next_release()).handle == submit.handle
        assert call.done()

    run(model, script)


def test_engine_refusal_is_the_only_answer_with_its_retry_hint(model: Path) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(text_request())
        submit = await served.engine.next_submit()
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        served.engine.refuse(submit.handle, code, "queue is full: 1024 requests", 2.5)
        error = await failure(all_events(call))
        assert error.code() == code
        assert error.details() == "queue is full: 1024 requests"
        assert ("grpc-retry-pushback-ms", "2500") in tuple(error.trailing_metadata())

    run(model, script)


def test_rank_lost_in_the_middle_ends_the_stream_after_its_tokens(model: Path, encode: Any) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(text_request())
        submit = await served.engine.next_submit()
        served.engine.send_outputs({submit.handle: encode("he")})
        served.engine.refuse(submit.handle, grpc.StatusCode.UNAVAILABLE, "rank 1 lost at step 9")
        events = aiter(call)
        first = [await within(anext(events)), await within(anext(events))]
        assert kinds(first) == ["started", "delta"]
        error = await failure(all_events(events))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert error.details() == "rank 1 lost at step 9"

    run(model, script)


def test_abort_asks_the_engine_by_name(model: Path) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Abort(generate_pb2.AbortRequest(request_id="r-1"))
        question = await within(served.engine.aborts.get())
        assert question.request_id == "r-1"
        served.engine.send(
            abort_outcome=engine_pb2.AbortOutcome(query=question.query, was_active=True)
        )
        assert (await within(call)).was_active

    run(model, script)
