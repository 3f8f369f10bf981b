"""Requests become messages, whole or not at all; answers become dataclasses."""

import dataclasses
from typing import Any

import pytest
from google.protobuf.message import Message

from lockstep.client import (
    Chat,
    ChatMessage,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    results,
)
from lockstep.client.wire import completion_of, finished_of, request_message
from protos.lockstep.v1 import generate_pb2

# One value a field; the constraints exclude each other.
_VALUES: dict[str, Any] = {
    **dict.fromkeys(("temperature", "top_p", "min_p"), 0.5),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), 0.5),
    **dict.fromkeys(("top_k", "seed", "max_tokens", "min_tokens", "logprobs", "n"), 3),
    "prompt_logprobs": 0,
    **dict.fromkeys(("ignore_eos", "include_stop"), False),
    **dict.fromkeys(("stop", "bad_words"), ("a", "b")),
    "stop_token_ids": (4, 5),
    "logit_bias": {7: -1.5},
}
_CONSTRAINTS: dict[str, Any] = {
    **dict.fromkeys(("json_schema", "regex", "lark_grammar", "gbnf_grammar"), "x"),
    "json_object": True,
    "choice": ("yes", "no"),
}


def _message(**params: Any) -> generate_pb2.SamplingParams:
    return request_message(GenerateRequest("x", SamplingParams(**params))).sampling_params


@pytest.mark.parametrize(
    ("dataclass", "message"),
    [
        (SamplingParams, generate_pb2.SamplingParams),
        (results.Started, generate_pb2.Started),
        (results.Delta, generate_pb2.Delta),
        (results.TokenLogprobs, generate_pb2.TokenLogprobs),
        (results.PromptLogprobs, generate_pb2.PromptLogprobs),
        (results.Usage, generate_pb2.Usage),
        (results.Finished, generate_pb2.Finished),
        (results.ModelInfo, generate_pb2.GetModelInfoResponse),
        (results.ServerInfo, generate_pb2.GetServerInfoResponse),
        (results.RankInfo, generate_pb2.RankInfo),
    ],
    ids=lambda kind: kind.__name__,
)
def test_a_dataclass_has_every_field_of_its_message(dataclass: Any, message: type[Message]) -> None:
    names = {field.name for field in message.DESCRIPTOR.fields}
    assert {field.name for field in dataclasses.fields(dataclass)} == names


def test_a_request_has_every_field_of_its_message() -> None:
    prompts = {field.name for field in generate_pb2.GenerateRequest.DESCRIPTOR.oneofs[0].fields}
    names = {field.name for field in generate_pb2.GenerateRequest.DESCRIPTOR.fields} - prompts
    ours = {field.name for field in dataclasses.fields(GenerateRequest)} - {"prompt"}
    assert ours == names - {"sampling_params"} | {"sampling"}


def test_every_parameter_arrives_also_a_zero() -> None:
    message = _message(**_VALUES)
    assert {field.name for field, _ in message.ListFields()} == _VALUES.keys()
    assert dict(message.logit_bias) == {7: -1.5}
    assert list(message.stop) == ["a", "b"]
    assert _VALUES.keys() | _CONSTRAINTS.keys() == {
        field.name for field in dataclasses.fields(SamplingParams)
    }


@pytest.mark.parametrize("name", _CONSTRAINTS)
def test_a_constraint_arrives_alone(name: str) -> None:
    message = _message(**{name: _CONSTRAINTS[name]})
    assert message.WhichOneof("constraint") == name
    if name == "choice":
        assert list(message.choice.choices) == ["yes", "no"]


def test_nothing_is_sent_of_what_was_not_set() -> None:
    message = request_message(GenerateRequest("x"))
    assert message == generate_pb2.GenerateRequest(
        text="x", sampling_params=generate_pb2.SamplingParams()
    )


def test_two_constraints_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="regex and choice are both set"):
        SamplingParams(regex="a", choice=["b"])


@pytest.mark.parametrize("name", ["stop", "bad_words", "choice"])
def test_one_text_for_a_list_of_texts_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} is a text"):
        _message(**{name: "abc"})


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"max_tokens": 2**40}, "max_tokens is 1099511627776"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"stop_token_ids": ["x"]}, r"stop_token_ids is \['x'\]"),
        ({"stop": [3]}, r"stop is \[3\]"),
    ],
)
def test_a_value_that_the_message_cannot_hold_is_refused_by_name(
    params: dict[str, Any], words: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        _message(**params)


@pytest.mark.parametrize(
    ("prompt", "kind", "words"),
    [
        (None, TypeError, "prompt is None"),
        ("\ud800", ValueError, "prompt is .*surrogates not allowed"),
        ([1, "x"], TypeError, r"prompt is \[1, 'x'\]"),
        ([2**70], ValueError, "prompt is "),
    ],
)
def test_a_prompt_that_the_message_cannot_hold_is_refused_as_the_prompt(
    prompt: Any, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        request_message(GenerateRequest(prompt))


def test_each_kind_of_prompt_sets_its_own_field() -> None:
    assert request_message(GenerateRequest("")).WhichOneof("prompt") == "text"
    assert list(request_message(GenerateRequest([1, 2])).token_ids.ids) == [1, 2]
    assert request_message(GenerateRequest([])).WhichOneof("prompt") == "token_ids"
    chat = request_message(GenerateRequest(Chat([ChatMessage("user", "hi")]))).chat
    assert [(turn.role, turn.content) for turn in chat.messages] == [("user", "hi")]
    assert request_message(GenerateRequest(Chat([]))).WhichOneof("prompt") == "chat"


def test_what_stopped_an_output_is_set_alone() -> None:
    message = generate_pb2.Finished(
        finish_reason=generate_pb2.FINISH_REASON_STOP, stop_token_id=0, sample_index=1
    )
    finished = finished_of(message)
    assert finished.finish_reason is FinishReason.STOP
    assert (finished.stop, finished.stop_token_id, finished.sample_index) == (None, 0, 1)


def test_a_unary_answer_has_all_samples_and_prompt_logprobs() -> None:
    done = generate_pb2.Finished(finish_reason=generate_pb2.FINISH_REASON_LENGTH)
    message = generate_pb2.GenerateUnaryResponse(
        output=generate_pb2.Delta(text="a"),
        finished=done,
        further_samples=[generate_pb2.Sample(output=generate_pb2.Delta(text="b"), finished=done)],
        prompt_logprobs=generate_pb2.PromptLogprobs(first_position=1, token_ids=[8]),
    )
    answer = completion_of(message)
    assert (answer.text, [sample.text for sample in answer.samples]) == ("a", ["a", "b"])
    assert answer.prompt_logprobs is not None and answer.prompt_logprobs.token_ids == (8,)
