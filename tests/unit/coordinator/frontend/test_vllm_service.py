"""`VllmEngine` on the public port, with a scripted engine behind it."""

import io
import zipfile
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from coordinator.frontend.tokenizer import Tokenizer
from protos.lockstep.v1 import engine_pb2
from protos.vllm_engine import vllm_engine_pb2 as vllm
from protos.vllm_engine.vllm_engine_pb2_grpc import VllmEngineStub
from tests.unit.coordinator.frontend.fake_engine import (
    MAX_MODEL_LEN,
    MODEL_NAME,
    VOCAB_SIZE,
    Served,
    within,
    write_ids_only_model,
)
from tests.unit.coordinator.frontend.vllm_calls import (
    ABORTED,
    LENGTH,
    STOP,
    collect,
    failure,
    logprobs_of,
    request,
    run,
)


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
