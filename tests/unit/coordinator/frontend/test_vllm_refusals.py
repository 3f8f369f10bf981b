"""What `VllmEngine` refuses, in the words of its own fields."""

from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from protos.vllm_engine import vllm_engine_pb2 as vllm
from protos.vllm_engine.vllm_engine_pb2_grpc import VllmEngineStub
from tests.unit.coordinator.frontend.fake_engine import (
    VOCAB_SIZE,
    Served,
    within,
)
from tests.unit.coordinator.frontend.test_error_details import detail, details_of
from tests.unit.coordinator.frontend.vllm_calls import failure, request, run


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
