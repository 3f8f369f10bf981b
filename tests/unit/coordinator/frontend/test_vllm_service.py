"""`VllmEngine` on the public port, with a scripted engine behind it."""

import asyncio
import io
import zipfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2

from coordinator.frontend.tokenizer import Tokenizer
from protos.lockstep.v1 import engine_pb2, generate_pb2
from protos.vllm_engine import vllm_engine_pb2 as vllm
from protos.vllm_engine.vllm_engine_pb2_grpc import VllmEngineStub
from tests.unit.coordinator.frontend.fake_engine import (
    MAX_MODEL_LEN,
    MODEL_NAME,
    VOCAB_SIZE,
    Served,
    serving,
    within,
    write_ids_only_model,
)
from tests.unit.coordinator.frontend.test_error_details import detail, details_of

Script = Callable[[Served, VllmEngineStub], Awaitable[None]]

LENGTH = generate_pb2.FINISH_REASON_LENGTH
STOP = generate_pb2.FINISH_REASON_STOP
ABORTED = generate_pb2.FINISH_REASON_ABORTED


def run(model: Path, script: Script, **settings: Any) -> None:
    """Runs `script` against a serving frontend."""

    async def main() -> None:
        async with serving(model, **settings) as served:
            await script(served, VllmEngineStub(served.channel))

    asyncio.run(main())


def request(stream: bool = True, name: str = "", **params: Any) -> vllm.GenerateRequest:
    return vllm.GenerateRequest(
        request_id=name,
        tokenized=vllm.TokenizedInput(input_ids=[1, 2, 3]),
        sampling_params=vllm.SamplingParams(**params),
        stream=stream,
    )


async def collect(call: Any) -> list[vllm.GenerateResponse]:
    async def all_of() -> list[vllm.GenerateResponse]:
        return [message async for message in call]

    return await within(all_of())


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await within(call if isinstance(call, grpc.aio.UnaryUnaryCall) else collect(call))
    return caught.value


def logprobs_of(*values: float) -> list[generate_pb2.TokenLogprobs]:
    return [
        generate_pb2.TokenLogprobs(logprob=value, top_token_ids=[8], top_logprobs=[-0.5])
        for value in values
    ]


def test_a_stream_has_new_ids_in_each_chunk_and_all_in_the_last_message(model: Path) -> None:
    async def script(served: Served, stub: VllmEngineStub) -> None:
        call = stub.Generate(request(seed=5, max_tokens=9))
        submit = await served.engine.next_submit()
        assert np.frombuffer(submit.prompt_ids, "<i4").tolist() == [1, 2, 3]
        assert (submit.sampling_params.seed, submit.sampling_params.max_tokens) == (5, 9)
        messages = aiter(call)
        served.engine.send_outputs({submit.handle: [40]})
        first = (await within(anext(messages))).chunk
        assert (list(first.token_ids), first.prompt_tokens, first.completion_tokens) == ([40], 3, 1)
        served.engine.send_outputs({submit.handle: [41, 42]})
        second = (await within(anext(messages))).chunk
        assert (list(second.token_ids), second.completion_tokens) == ([41, 42], 3)
        times = engine_pb2.RequestTimes(cached_token_count=2)
        served.engine.end(submit.handle, LENGTH, times=times)
        (last,) = await collect(messages)
        assert last.complete == vllm.GenerateComplete(
            output_ids=[40, 41, 42],
            finish_reason="length",
            prompt_tokens=3,
            completion_tokens=3,
            cached_tokens=2,
        )

    run(model, script)


def test_without_stream_there_is_one_message_with_everything(model: Path) -> None:
    async def script(served: Served, stub: VllmEngineStub) -> None:
        call = stub.Generate(request(stream=False, logprobs=1))
        submit = await served.engine.next_submit()
        served.engine.send_outputs({submit.handle: [40]}, logprobs_of(-0.25))
        served.engine.send_outputs({submit.handle: [7]}, logprobs_of(-0.75))
        served.engine.end(submit.handle, STOP, stop_token_id=7)
        (last,) = await collect(call)
        assert list(last.complete.output_ids) == [40, 7]
        assert last.complete.finish_reason == "stop"
        assert last.complete.matched_token_id == 7
        logprobs = last.complete.output_logprobs
        assert list(logprobs.token_logprobs) == [-0.25, -0.75]
        assert list(logprobs.token_ids) == [40, 7]
        assert [list(top.token_ids) for top in logprobs.top_logprobs] == [[8], [8]]
        assert [list(top.values) for top in logprobs.top_logprobs] == [[-0.5], [-0.5]]

    run(model, script)


def test_logprobs_of_a_stream_come_with_their_ids(model: Path) -> None:
    async def script(served: Served, stub: VllmEngineStub) -> None:
        call = stub.Generate(request(logprobs=1))
        submit = await served.engine.next_submit()
        served.engine.send_outputs({submit.handle: [40, 41]}, logprobs_of(-0.25, -0.75))
        served.engine.end(submit.handle)
        chunk, last = await collect(call)
        assert list(chunk.chunk.output_logprobs.token_ids) == [40, 41]
        assert list(chunk.chunk.output_logprobs.token_logprobs) == [-0.25, -0.75]
        assert not last.complete.HasField("output_logprobs")

    run(model, script)


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_text_ends_the_request_and_its_ids_are_all_there(
    model: Path, encode: Any, stream: bool
) -> None:
    """The gateway trims the text itself: without the ids of the stop it would cut too much."""

    async def script(served: Served, stub: VllmEngineStub) -> None:
        call = stub.Generate(request(stream, stop=["lo w"]))
        submit = await served.engine.next_submit()
        output = encode("hello world, and more")
        served.engine.send_outputs({submit.handle: output})
        release = await served.engine.next_release()
        assert release.reason == "stop"
        times = engine_pb2.RequestTimes(cached_token_count=1)
        served.engine.answer_release(release, times)
        *chunks, last = await collect(call)
        through_stop = next(
            output[:end]
            for end in range(len(output) + 1)
            if sum(map(len, map(Tokenizer.from_dir(model).token_bytes, output[:end]))) >= 7
        )
        assert list(last.complete.output_ids) == through_stop
        assert [token for chunk in chunks for token in chunk.chunk.token_ids] == (
            through_stop if stream else []
        )
        assert last.complete.finish_reason == "stop"
        assert last.complete.matched_stop_str == "lo w"
        assert last.complete.completion_tokens == len(through_stop)
        assert last.complete.cached_tokens == 1

    run(model, script)


def test_each_of_n_outputs_has_its_chunks_and_its_end(model: Path) -> None:
    async def script(served: Served, stub: VllmEngineStub) -> None:
        call = stub.Generate(request(n=2, seed=4))
        handles = []
        for index in range(2):
            submit = await served.engine.next_submit()
            assert submit.sampling_params.seed == 4 + index
            handles.append(submit.handle)
        served.engine.send_outputs({handles[0]: [40], handles[1]: [50, 51]})
        for handle in handles:
            served.engine.end(handle)
        messages = await collect(call)
        chunks = {m.chunk.index: list(m.chunk.token_ids) for m in messages if m.HasField("chunk")}
        ends = {m.complete.index: list(m.complete.output_ids) for m in messages[-2:]}
        assert chunks == ends == {0: [40], 1: [50, 51]}

    run(model, script)


def test_max_tokens_beyond_the_context_are_what_fits(model: Path) -> None:
    async def script(served: Served, stub: VllmEngineStub) -> None:
        for max_tokens, granted in ((MAX_MODEL_LEN, MAX_MODEL_LEN - 3), (5, 5)):
            call = stub.Generate(request(max_tokens=max_tokens))
            submit = await served.engine.next_submit()
            assert submit.sampling_params.max_tokens == granted
            call.cancel()

    run(model, script)


def test_abort_ends_the_stream_and_is_idempotent(model: Path) -> None:
    async def script(served: Served, stub: VllmEngineStub) -> None:
        call = stub.Generate(request(name="r"))
        submit = await served.engine.next_submit()
        abort = stub.Abort(vllm.AbortRequest(request_ids=["r", "unknown"]))
        asked = {}
        for _ in range(2):
            query = await within(served.engine.aborts.get())
            asked[query.request_id] = query.query
        served.engine.end(submit.handle, ABORTED)
        for name, number in asked.items():
            outcome = engine_pb2.AbortOutcome(query=number, was_active=name == "r")
            served.engine.send(abort_outcome=outcome)
        await within(abort)
        (last,) = await collect(call)
        assert last.complete.finish_reason == "abort"
        again = stub.Abort(vllm.AbortRequest(request_ids=["r"]))
        query = await within(served.engine.aborts.get())
        served.engine.send(abort_outcome=engine_pb2.AbortOutcome(query=query.query))
        await within(again)
        await within(stub.Abort(vllm.AbortRequest()))

    run(model, script)


@pytest.mark.parametrize(
    ("names", "words"),
    [(["r", "x" * 257], "request_ids[1]"), (["r"] * 1025, "number of request_ids is 1025")],
    ids=["long", "many"],
)
def test_a_bad_abort_ends_nothing(model: Path, names: list[str], words: str) -> None:
    async def script(served: Served, stub: VllmEngineStub) -> None:
        error = await failure(stub.Abort(vllm.AbortRequest(request_ids=names)))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert words in str(error.details())
        assert served.engine.aborts.empty()

    run(model, script)


@pytest.mark.parametrize("stream", [True, False])
def test_a_dropped_call_releases_the_request_also_after_abort(model: Path, stream: bool) -> None:
    async def script(served: Served, stub: VllmEngineStub) -> None:
        call = stub.Generate(request(stream, name="r"))
        submit = await served.engine.next_submit()
        served.engine.send_outputs({submit.handle: [40]})
        abort = stub.Abort(vllm.AbortRequest(request_ids=["r"]))
        query = await within(served.engine.aborts.get())
        call.cancel()
        release = await served.engine.next_release()
        assert (release.handle, release.reason) == (submit.handle, "cancelled")
        served.engine.send(abort_outcome=engine_pb2.AbortOutcome(query=query.query))
        await within(abort)

    run(model, script)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (request(top_p=1.5), ["top_p", "1.5", "at most 1"]),
        (request(n=17), ["n", "17", "at most 16"]),
        (request(max_tokens=0), ["max_tokens", "0", "at least 1"]),
        (request(logprobs=-1), ["logprobs", "-1", "at least 0"]),
        (request(stop=[""]), ["stop[0]", "1 to 256"]),
        (request(name="r" * 257), ["request_id", "1 to 256"]),
        (request(structural_tag="{}"), ["structural_tag", "'{}'", "unset"]),
        (request(truncate_prompt_tokens=5), ["truncate_prompt_tokens", "5", "unset"]),
        (request(prompt_logprobs=1), ["prompt_logprobs", "1", "unset"]),
        (request(grammar="x" * 65537), ["bytes of grammar", "65537", "65536"]),
        (request(top_k=2**31), ["top_k", str(2**31), "at most"]),
        (request(stop_token_ids=[1, 2**31]), ["stop_token_ids[1]", str(2**31), "at most"]),
        (request(logit_bias={VOCAB_SIZE: 1.0}), ["id in logit_bias", str(VOCAB_SIZE)]),
        (vllm.GenerateRequest(), ["input", "tokenized and text"]),
        (
            vllm.GenerateRequest(tokenized=vllm.TokenizedInput(input_ids=[1, VOCAB_SIZE])),
            ["tokenized.input_ids[1]", str(VOCAB_SIZE), str(VOCAB_SIZE - 1)],
        ),
        (
            vllm.GenerateRequest(tokenized=vllm.TokenizedInput(input_ids=[1] * 65)),
            ["number of tokens in input", "65", "63"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_naming_field_value_and_limit(
    model: Path, message: vllm.GenerateRequest, words: list[str]
) -> None:
    async def script(served: Served, stub: VllmEngineStub) -> None:
        error = await failure(stub.Generate(message))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert all(word in str(error.details()) for word in words), error.details()
        await within(served.engine.rejections_arrived.wait())
        assert served.engine.rejected == {"invalid_argument": 1}
        assert served.engine.submits.empty()

    run(model, script)


def test_a_field_that_is_not_declared_is_refused_by_its_number(model: Path) -> None:
    """Pictures, for example, are field 7."""

    async def script(served: Served, stub: VllmEngineStub) -> None:
        raw = request().SerializeToString() + bytes([7 << 3 | 2, 1, 0])
        call = served.channel.unary_stream("/vllm.grpc.engine.VllmEngine/Generate")(raw)
        error = await failure(call)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "field 7 of vllm.grpc.engine.GenerateRequest" in str(error.details())

    run(model, script)


@pytest.mark.parametrize("method", ["Embed", "FlushCache", "StartProfile", "SubscribeKvEvents"])
def test_other_methods_are_unimplemented(model: Path, method: str) -> None:
    async def script(served: Served, stub: VllmEngineStub) -> None:
        call = served.channel.unary_unary(f"/vllm.grpc.engine.VllmEngine/{method}")(b"")
        assert (await failure(call)).code() == grpc.StatusCode.UNIMPLEMENTED

    run(model, script)


def test_an_error_of_the_engine_ends_the_call_with_its_status(model: Path) -> None:
    async def script(served: Served, stub: VllmEngineStub) -> None:
        call = stub.Generate(request())
        submit = await served.engine.next_submit()
        served.engine.refuse(submit.handle, grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        error = await failure(call)
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == "the queue is full"

    run(model, script)


def test_what_the_engine_refuses_names_the_gateways_field(model: Path) -> None:
    async def script(served: Served, stub: VllmEngineStub) -> None:
        call = stub.Generate(request(grammar="root ::="))
        submit = await served.engine.next_submit()
        served.engine.send(
            ended={
                "handle": submit.handle,
                "status_code": grpc.StatusCode.INVALID_ARGUMENT.value[0],
                "status_message": "gbnf_grammar cannot be used: unfinished",
                "field": "gbnf_grammar",
            }
        )
        error = await failure(call)
        assert error.details() == "grammar cannot be used: unfinished"
        (bad,) = detail(details_of(error), error_details_pb2.BadRequest)
        violation = bad.field_violations[0]  # type: ignore[attr-defined]
        assert violation.field == "sampling_params.grammar"

    run(model, script)


def test_health_and_model_are_unavailable_until_the_group_can_answer(model: Path) -> None:
    """A gateway asks for the model once: it must not learn one without limits."""

    async def script(served: Served, stub: VllmEngineStub) -> None:
        for call in (
            stub.HealthCheck(vllm.HealthCheckRequest()),
            stub.GetModelInfo(vllm.GetModelInfoRequest()),
        ):
            error = await failure(call)
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            assert "coordinator is starting" in str(error.details())

    run(model, script, is_ready=False)


def test_a_gateway_learns_what_it_asks_for(model: Path) -> None:
    async def script(served: Served, stub: VllmEngineStub) -> None:
        assert (await within(stub.HealthCheck(vllm.HealthCheckRequest()))).healthy
        info = await within(stub.GetModelInfo(vllm.GetModelInfoRequest()))
        assert info.served_model_name == MODEL_NAME
        assert (info.max_context_length, info.vocab_size) == (MAX_MODEL_LEN, VOCAB_SIZE)
        assert info.max_req_input_len == MAX_MODEL_LEN - 1
        assert info.is_generation
        server = await within(stub.GetServerInfo(vllm.GetServerInfoRequest()))
        assert server.data_parallel_size == 1 and server.uptime_seconds > 0
        loads = await within(stub.GetLoads(vllm.GetLoadsRequest(dp_rank=0)))
        assert loads.dp_rank_count == len(loads.loads) == 1
        error = await failure(stub.GetLoads(vllm.GetLoadsRequest(dp_rank=1)))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT

    run(model, script)


def test_the_tokenizer_travels_as_an_archive(model: Path) -> None:
    async def script(served: Served, stub: VllmEngineStub) -> None:
        archives = []
        for _ in range(2):
            pieces = stub.GetTokenizer(vllm.GetTokenizerRequest())
            archives.append(b"".join([piece.data async for piece in pieces]))
        assert archives[0] == archives[1]
        archive = zipfile.ZipFile(io.BytesIO(archives[0]))
        assert archive.read("tokenizer.json") == (model / "tokenizer.json").read_bytes()

    run(model, script)


def test_without_a_tokenizer_there_is_none_to_send(tmp_path: Path) -> None:
    async def script(served: Served, stub: VllmEngineStub) -> None:
        error = await failure(stub.GetTokenizer(vllm.GetTokenizerRequest()))
        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION

    run(write_ids_only_model(tmp_path / "ids"), script)
