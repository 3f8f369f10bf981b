"""Bad input over real gRPC: named, and without effect on streams that run beside it."""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.lockstep.v1 import generate_pb2
from tests.helpers.message_client import Client, chat_request, ids_request, text_request
from tests.helpers.served_group import ServedGroup
from tests.helpers.tiny_models import write_tiny_model
from tests.integration.conftest import CPU_FLAGS

_LIMIT_S = 60.0
_FLAGS = (*CPU_FLAGS, "--tp", "2", "--max-model-len", "1024", "--kv-cache-bytes", "1M")
_HEALTHY = ids_request([5, 6, 7], temperature=0.0, max_tokens=50, ignore_eos=True)


def _named(request_id: str) -> generate_pb2.GenerateRequest:
    request = text_request("hello", max_tokens=4)
    request.request_id = request_id
    return request


def _model(name: str) -> generate_pb2.GenerateRequest:
    request = text_request("hello", max_tokens=4)
    request.model = name
    return request


def _resumed(*ids: int) -> generate_pb2.GenerateRequest:
    request = text_request("hello", max_tokens=2)
    request.resume_output_ids.extend(ids)
    return request


def _hello(**params: Any) -> generate_pb2.GenerateRequest:
    return text_request("hello", **params)


# What is sent, and words that the answer must have: field, value, limit.
BAD = {
    "no prompt": (generate_pb2.GenerateRequest(), ["prompt", "unset", "token_ids"]),
    "empty text": (text_request(""), ["text", "''", "not empty"]),
    "empty ids": (ids_request([]), ["number of tokens in prompt", "0", "at least 1"]),
    "empty chat": (chat_request([]), ["chat.messages", "0", "at least 1"]),
    "too long a prompt": (
        ids_request([5] * 1024),
        ["number of tokens in prompt", "1024", "at most 1023"],
    ),
    "too long a text": (
        text_request("hello " * 2000),
        ["tokens in prompt", "2001", "at most 1023"],
    ),
    "max_tokens 0": (_hello(max_tokens=0), ["max_tokens", "0", "at least 1"]),
    "max_tokens beyond": (_hello(max_tokens=1024), ["max_tokens", "1024", "at most 1023"]),
    "min_tokens": (_hello(max_tokens=3, min_tokens=4), ["min_tokens", "4", "max_tokens"]),
    "NaN temperature": (_hello(temperature=math.nan), ["temperature", "nan", "at least 0"]),
    "negative temperature": (_hello(temperature=-1.0), ["temperature", "-1", "at least 0"]),
    "infinite temperature": (_hello(temperature=math.inf), ["temperature", "inf", "at most 100"]),
    "top_p 0": (_hello(top_p=0.0), ["top_p", "0.0", "above 0"]),
    "top_p 2": (_hello(top_p=2.0), ["top_p", "2.0", "at most 1"]),
    "top_k": (_hello(top_k=-1), ["top_k", "-1", "at least 0"]),
    "min_p": (_hello(min_p=1.5), ["min_p", "1.5", "at most 1"]),
    "repetition": (_hello(repetition_penalty=0.0), ["repetition_penalty", "0.0", "at least"]),
    "presence": (_hello(presence_penalty=3.0), ["presence_penalty", "3.0", "at most 2"]),
    "frequency": (_hello(frequency_penalty=math.nan), ["frequency_penalty", "nan", "at most 2"]),
    "logprobs": (_hello(logprobs=21), ["logprobs", "21", "at most 20"]),
    "stop text": (_hello(stop=[""]), ["stop[0]", "''", "1 to 256"]),
    "stop texts": (_hello(stop=["x"] * 17), ["stop", "17", "at most 16"]),
    "stop ids": (_hello(stop_token_ids=[3] * 17), ["stop_token_ids", "17", "at most 16"]),
    "stop id": (_hello(stop_token_ids=[49152]), ["stop_token_ids[0]", "49152", "49151"]),
    "negative id": (ids_request([5, -1]), ["token_ids.ids[1]", "-1", "0 to 49151"]),
    "id out of range": (ids_request([49152]), ["token_ids.ids[0]", "49152", "0 to 49151"]),
    "resumed id": (_resumed(49152), ["resume_output_ids[0]", "49152", "49151"]),
    "resumed ids": (_resumed(1, 1, 1), ["resume_output_ids", "3", "at most max_tokens"]),
    "request id": (_named("x" * 257), ["request_id", "257", "1 to 256"]),
    "model": (_model("gpt-5"), ["model", "gpt-5", "the one here"]),
    "10 MB of text": (text_request("a " * 5_000_000), ["length of text", "10000000", "at most"]),
    "10 MB of chat": (
        chat_request([{"role": "user", "content": "a" * 10_000_000}]),
        ["length of chat.messages", "10000004", "at most"],
    ),
}

# A valid request with bytes added or replaced, and words that the answer must have.
BAD_BYTES = {
    "unparsable": (b"\x0a\xff", ["request", "lockstep.v1.GenerateRequest"]),
    "invalid UTF-8": (b"\x1a\x03a\xffb", ["text", "\\xff", "valid UTF-8"]),
    "invalid UTF-8 in chat": (
        b"\x22\x07\x0a\x05\x12\x03a\xffb",
        ["chat.messages.content", "\\xff", "valid UTF-8"],
    ),
    "unknown field": (b"\x1a\x01a\xa0\x06\x01", ["field 100", "GenerateRequest", "version"]),
}


@pytest.fixture(scope="module")
def group(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGroup]:
    """A tiny model with SmolLM2's tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("bad-input")
    write_tiny_model(folder / "model", vocab_size=49152, max_position_embeddings=1024)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2_dir / name, folder / "model" / name)
    with ServedGroup(folder / "model", folder / "group", *_FLAGS) as group:
        yield group


@pytest.fixture(scope="module")
def client(group: ServedGroup) -> Iterator[Client]:
    with group.client() as client:
        yield client


@pytest.fixture(scope="module")
def channel(group: ServedGroup) -> Iterator[grpc.Channel]:
    with group.channel() as channel:
        yield channel


@pytest.fixture(scope="module", autouse=True)
def healthy(client: Client) -> Iterator[None]:
    """One good request after the other beside all of this file's bad ones; none is harmed."""

    def output() -> list[int]:
        generation = client.generate(_HEALTHY, timeout_s=_LIMIT_S)
        return [token for delta in generation for token in delta.token_ids]

    alone = output()
    assert len(alone) == 50
    beside: list[list[int]] = []
    is_over = threading.Event()

    def repeat() -> None:
        while not is_over.is_set() or len(beside) < 2:
            beside.append([])  # stays empty, and is found below, if the call fails
            beside[-1] = output()

    thread = threading.Thread(target=repeat)
    thread.start()
    yield
    is_over.set()
    thread.join(_LIMIT_S)
    assert not thread.is_alive()
    assert len(beside) > 1
    assert all(tokens == alone for tokens in beside)


def refusal(channel: grpc.Channel, raw: bytes) -> grpc.RpcError:
    """The error that a call with these bytes ends in, after no message at all."""
    call = channel.unary_stream("/lockstep.v1.GenerateService/Generate")(raw, timeout=_LIMIT_S)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value


def assert_names(error: Any, words: list[str]) -> None:
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    missing = [word for word in words if word not in error.details()]
    assert not missing, f"{missing} not in {error.details()!r}"


@pytest.mark.parametrize(("request_sent", "words"), BAD.values(), ids=BAD.keys())
def test_is_refused_by_field_value_and_limit(
    channel: grpc.Channel,
    request_sent: generate_pb2.GenerateRequest,
    words: list[str],
) -> None:
    assert_names(refusal(channel, request_sent.SerializeToString()), words)


@pytest.mark.parametrize(("raw", "words"), BAD_BYTES.values(), ids=BAD_BYTES.keys())
def test_bytes_that_are_no_request_are_refused(
    channel: grpc.Channel, raw: bytes, words: list[str]
) -> None:
    assert_names(refusal(channel, raw), words)


def test_a_name_in_use_is_refused_and_free_again_afterwards(
    client: Client, channel: grpc.Channel
) -> None:
    request = ids_request([8, 9], temperature=0.0, max_tokens=1000, ignore_eos=True)
    request.request_id = "mine"
    first = client.generate(request, timeout_s=_LIMIT_S)
    next(iter(first))
    error = refusal(channel, request.SerializeToString())
    assert_names(error, ["request_id", "mine"])
    assert client.abort("mine")
    list(first)
    assert first.finished is not None
    assert first.finished.finish_reason == generate_pb2.FINISH_REASON_ABORTED
    request.sampling_params.max_tokens = 1
    assert client.generate_unary(request, timeout_s=_LIMIT_S).started.request_id == "mine"


def test_unary_calls_are_refused_in_the_same_words(
    group: ServedGroup, channel: grpc.Channel
) -> None:
    message = generate_pb2.GenerateUnaryRequest(request=_hello(max_tokens=0))
    with pytest.raises(grpc.RpcError) as caught:
        group.stub(channel).GenerateUnary(message, timeout=_LIMIT_S)
    assert_names(caught.value, ["max_tokens", "0", "at least 1"])
