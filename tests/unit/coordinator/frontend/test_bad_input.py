"""Every kind of bad input is INVALID_ARGUMENT naming field, value and limit, and harms nobody."""

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.lockstep.v1 import generate_pb2
from tests.unit.coordinator.frontend.fake_engine import (
    MAX_MODEL_LEN,
    VOCAB_SIZE,
    Served,
    serving,
    within,
)


def request(text: str = "hello", **params: Any) -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(
        text=text, sampling_params=generate_pb2.SamplingParams(**params)
    )


def ids_request(*ids: int) -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(token_ids=generate_pb2.TokenIds(ids=ids))


def with_fields(**fields: Any) -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(text="hello", **fields)


def chat_request(*messages: generate_pb2.ChatMessage) -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(chat=generate_pb2.ChatPrompt(messages=messages))


_USER = generate_pb2.ChatMessage(role="user", content="hi")

# What is sent, and words that the answer must have: field, value, limit.
BAD = {
    "no prompt": (generate_pb2.GenerateRequest(), ["prompt", "unset", "token_ids"]),
    "empty text": (request(""), ["text", "''", "not empty"]),
    "empty ids": (ids_request(), ["number of tokens in prompt", "0", "at least 1"]),
    "empty chat": (chat_request(), ["chat.messages", "0", "at least 1"]),
    "too many messages": (chat_request(*[_USER] * 65), ["chat.messages", "65", "64"]),
    "prompt too long": (
        ids_request(*[1] * MAX_MODEL_LEN),
        ["number of tokens in prompt", "64", "at most 63"],
    ),
    "text too long in tokens": (
        request("q" * 100),
        ["number of tokens in prompt", "100", "at most 63"],
    ),
    "10 MB of text": (request("a " * 5_000_000), ["length of text", "10000000", "at most"]),
    "10 MB of chat": (
        chat_request(generate_pb2.ChatMessage(role="user", content="a" * 10_000_000)),
        ["length of chat.messages", "1000000", "at most"],
    ),
    "negative id": (ids_request(1, -3), ["token_ids.ids[1]", "-3", str(VOCAB_SIZE - 1)]),
    "unknown id": (ids_request(VOCAB_SIZE), ["token_ids.ids[0]", "512", str(VOCAB_SIZE - 1)]),
    "max_tokens 0": (request(max_tokens=0), ["max_tokens", "0", "at least 1"]),
    "max_tokens too large": (request(max_tokens=500), ["max_tokens", "500", "at most"]),
    "NaN temperature": (request(temperature=math.nan), ["temperature", "nan", "at least 0"]),
    "infinite temperature": (request(temperature=math.inf), ["temperature", "inf", "at most 100"]),
    "negative temperature": (request(temperature=-0.5), ["temperature", "-0.5", "at least 0"]),
    "top_p 0": (request(top_p=0.0), ["top_p", "0", "above 0"]),
    "top_p above 1": (request(top_p=1.5), ["top_p", "1.5", "at most 1"]),
    "negative top_k": (request(top_k=-1), ["top_k", "-1", "at least 0"]),
    "min_p above 1": (request(min_p=2.0), ["min_p", "2", "at most 1"]),
    "repetition_penalty 0": (request(repetition_penalty=0.0), ["repetition_penalty", "0"]),
    "presence_penalty": (request(presence_penalty=3.0), ["presence_penalty", "3", "at most 2"]),
    "frequency_penalty": (
        request(frequency_penalty=math.nan),
        ["frequency_penalty", "nan", "at most 2"],
    ),
    "min_tokens above max": (request(max_tokens=3, min_tokens=4), ["min_tokens", "4", "3"]),
    "many logprobs": (request(logprobs=21), ["logprobs", "21", "at most 20"]),
    "many prompt logprobs": (
        request(prompt_logprobs=21),
        ["prompt_logprobs", "21", "at most 20"],
    ),
    "many stops": (request(stop=["x"] * 17), ["stop", "17", "at most 16"]),
    "empty stop": (request(stop=[""]), ["stop[0]", "''", "1 to 256"]),
    "long stop": (request(stop=["x" * 257]), ["stop[0]", "1 to 256"]),
    "many stop ids": (request(stop_token_ids=range(17)), ["stop_token_ids", "17", "at most 16"]),
    "unknown stop id": (request(stop_token_ids=[9999]), ["stop_token_ids[0]", "9999", "511"]),
    "NaN bias": (request(logit_bias={1: math.nan}), ["logit_bias[1]", "nan", "at most 100"]),
    "large bias": (request(logit_bias={1: -101}), ["logit_bias[1]", "-101", "at least -100"]),
    "bias of an unknown id": (request(logit_bias={512: 1}), ["id in logit_bias", "512", "511"]),
    "many biases": (
        request(logit_bias={token: 1.0 for token in range(301)}),
        ["logit_bias", "301", "at most 300"],
    ),
    "many bad words": (request(bad_words=["x"] * 17), ["bad_words", "17", "at most 16"]),
    "empty bad word": (request(bad_words=[""]), ["bad_words[0]", "''", "1 to 64"]),
    "bad word of many tokens": (
        request(bad_words=["a", "q" * 17]),
        ["bad_words[1]", "qqq", "1 to 16 tokens, not of 17"],
    ),
    "long schema": (request(json_schema="x" * 65537), ["json_schema", "65537", "65536"]),
    "no choices": (
        request(choice=generate_pb2.ChoiceConstraint()),
        ["choice.choices", "0", "1 to 256"],
    ),
    "empty choice": (
        request(choice=generate_pb2.ChoiceConstraint(choices=["a", ""])),
        ["choice.choices[1]", "''", "1 to 65536"],
    ),
    "endless regex": (request(regex="a", ignore_eos=True), ["ignore_eos", "True", "false"]),
    "long request id": (with_fields(request_id="r" * 257), ["request_id", "1 to 256"]),
    "n 0": (request(n=0), ["n", "0", "at least 1"]),
    "n too large": (request(n=17), ["n", "17", "at most 16"]),
    "n with resumed ids": (
        generate_pb2.GenerateRequest(
            text="hello",
            resume_output_ids=[1],
            sampling_params=generate_pb2.SamplingParams(n=2),
        ),
        ["n", "2", "resume_output_ids"],
    ),
    "prompt_logprobs with resumed ids": (
        generate_pb2.GenerateRequest(
            text="hello",
            resume_output_ids=[1],
            sampling_params=generate_pb2.SamplingParams(prompt_logprobs=0),
        ),
        ["prompt_logprobs is 0", "unset", "resume_output_ids"],
    ),
    "priority": (with_fields(priority=101), ["priority", "101", "at most 100"]),
    "negative priority": (with_fields(priority=-101), ["priority", "-101", "at least -100"]),
    "long tenant": (with_fields(tenant="t" * 65), ["tenant", "at most 64"]),
    "another model": (with_fields(model="gpt"), ["model", "'gpt'", "'tiny'"]),
    "unknown resumed id": (
        with_fields(resume_output_ids=[VOCAB_SIZE]),
        ["resume_output_ids[0]", "512", "511"],
    ),
    "too many resumed ids": (
        with_fields(resume_output_ids=[1] * 65),
        ["resume_output_ids", "65", "64"],
    ),
}


def check_refusals(
    model: Path,
    send: Callable[[Served], Any],
    words: list[str],
    reason: str = "invalid_argument",
) -> None:
    async def main() -> None:
        async with serving(model) as served:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await within(send(served))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            details = str(caught.value.details())
            assert all(word in details for word in words), details
            await within(served.engine.rejections_arrived.wait())
            assert served.engine.rejected == {reason: 1}
            assert served.engine.submits.empty()

    asyncio.run(main())


async def _drain(call: Any) -> None:
    async for _ in call:
        pass


def test_bad_requests_are_refused_naming_field_value_and_limit(model: Path) -> None:
    async def main() -> None:
        async with serving(model) as served:
            bystander = served.stub.Generate(request())
            submit = await served.engine.next_submit()
            for name, (message, words) in BAD.items():
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await within(_drain(served.stub.Generate(message)))
                assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, name
                details = str(caught.value.details())
                assert all(word in details for word in words), f"{name}: {details}"
                assert len(details) < 1000, name
            assert served.engine.submits.empty()
            served.engine.send_outputs({submit.handle: [40, 41]})
            served.engine.end(submit.handle)
            await within(_drain(bystander))
            abort = served.stub.Abort(generate_pb2.AbortRequest(request_id="nobody"))
            await within(served.engine.aborts.get())  # all rejections were sent before it
            abort.cancel()
            assert served.engine.rejected == {"invalid_argument": len(BAD)}

    asyncio.run(main())


def _raw_generate(served: Served, raw: bytes) -> Any:
    method = served.channel.unary_stream("/lockstep.v1.GenerateService/Generate")
    return _drain(method(raw))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\x1a\x02\xff\xfe", ["text", r"b'\xff\xfe'", "valid UTF-8"]),
        (b"\xff\xff\xff", ["request", "lockstep.v1.GenerateRequest"]),
        (b"\x1a\x7fabc", ["request", "lockstep.v1.GenerateRequest"]),
        (b"\x22\x06\x0a\x04\x12\x02\xc3\x28", ["chat.messages.content", "valid UTF-8"]),
        (b"\x1a\x01a\xba\x3e\x01x", ["field 999", "GenerateRequest", "does not know"]),
        (b"\x1a\x01a\x32\x03\xa0\x06\x01", ["field 100", "SamplingParams", "does not know"]),
    ],
    ids=["utf8", "garbage", "truncated", "nested utf8", "unknown field", "nested unknown field"],
)
def test_unparsable_bytes_are_invalid_argument(model: Path, raw: bytes, words: list[str]) -> None:
    check_refusals(model, lambda served: _raw_generate(served, raw), words)


def test_unary_call_refuses_in_the_same_words(model: Path) -> None:
    message = generate_pb2.GenerateUnaryRequest(request=request(top_p=7.0))
    check_refusals(model, lambda served: served.stub.GenerateUnary(message), ["top_p", "7", "1"])


def test_bad_abort_is_refused_and_not_counted_as_a_request(model: Path) -> None:
    async def main() -> None:
        async with serving(model) as served:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await within(served.stub.Abort(generate_pb2.AbortRequest()))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "request_id" in str(caught.value.details())
            assert not served.engine.rejected

    asyncio.run(main())
