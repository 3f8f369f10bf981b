"""What a gateway asks, in our words: nothing lost, nothing added, the rest refused by name."""

from collections.abc import Callable
from typing import Any

import pytest

from coordinator.errors import BadRequest
from coordinator.frontend.errors import RequestFailed
from coordinator.frontend.vllm_request import dialect_of, in_callers_words, lockstep_request
from protos.lockstep.v1 import generate_pb2
from protos.vllm_engine import vllm_engine_pb2 as vllm

# Fields of their SamplingParams that need no counterpart, with the reason.
_WITHOUT_COUNTERPART = {
    "skip_special_tokens": "in the dialect",
    "spaces_between_special_tokens": "the caller makes the text",
    "include_stop_str_in_output": "the caller makes the text",
    "grammar_from_first_token": "always so",
}
_REFUSED: dict[str, Any] = {
    "prompt_logprobs": 1,
    "truncate_prompt_tokens": 5,
    "structural_tag": "{}",
}


def request(**params: Any) -> vllm.GenerateRequest:
    return vllm.GenerateRequest(
        tokenized=vllm.TokenizedInput(input_ids=[1, 2]),
        sampling_params=vllm.SamplingParams(**params),
    )


def asked(**params: Any) -> dict[str, Any]:
    """Our sampling parameters for theirs, as far as they are set."""
    translated = lockstep_request(request(**params)).sampling_params
    return {field.name: value for field, value in translated.ListFields()}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"temperature": 0.0}, {"temperature": 0.0}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_k": 7}, {"top_k": 7}),
        ({"min_p": 0.25}, {"min_p": 0.25}),
        ({"frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
        ({"presence_penalty": -1.5}, {"presence_penalty": -1.5}),
        ({"repetition_penalty": 2.0}, {"repetition_penalty": 2.0}),
        ({"max_tokens": 9}, {"max_tokens": 9}),
        ({"max_tokens": 2**32 - 1}, {"max_tokens": 2**31 - 1}),
        ({"min_tokens": 3}, {"min_tokens": 3}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"stop_token_ids": [4, 5]}, {"stop_token_ids": [4, 5]}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"n": 3}, {"n": 3}),
        ({"logprobs": 0}, {"logprobs": 0}),
        ({"seed": -8}, {"seed": -8}),
        ({"logit_bias": {3: 1.5}}, {"logit_bias": {3: 1.5}}),
        ({"json_schema": "{}"}, {"json_schema": "{}"}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"json_object": True}, {"json_object": True}),
        ({"json_object": False}, {"json_object": False}),
        ({"grammar": "root ::= x"}, {"gbnf_grammar": "root ::= x"}),
        (
            {"choice": vllm.ChoiceConstraint(choices=["a"])},
            {"choice": generate_pb2.ChoiceConstraint(choices=["a"])},
        ),
    ],
    ids=str,
)
def test_a_parameter_has_its_counterpart(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    bare = asked()
    got = {name: value for name, value in asked(**theirs).items() if bare.get(name) != value}
    assert got == ours


def test_every_parameter_is_translated_refused_or_known_to_need_nothing() -> None:
    translated = {
        name
        for mark in test_a_parameter_has_its_counterpart.pytestmark
        for theirs, _ in mark.args[1]
        for name in theirs
    }
    known = translated | set(_WITHOUT_COUNTERPART) | set(_REFUSED)
    assert known == {field.name for field in vllm.SamplingParams.DESCRIPTOR.fields}


def test_zero_is_off_where_it_cannot_be_unset_and_unset_is_the_checkpoints() -> None:
    bare = lockstep_request(request()).sampling_params
    assert (bare.top_p, bare.top_k, bare.min_p, bare.repetition_penalty, bare.n) == (1, 0, 0, 1, 1)
    assert bare.HasField("top_k") and bare.HasField("min_p")
    for name in ("temperature", "seed", "max_tokens", "logprobs"):
        assert not bare.HasField(name)
    assert bare.WhichOneof("constraint") is None


@pytest.mark.parametrize("name", _REFUSED)
def test_what_is_not_honoured_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(BadRequest, match=f"{name} is .*{_REFUSED[name]}.*unset"):
        lockstep_request(request(**{name: _REFUSED[name]}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda it: it.tokenized.input_ids.append(2**31),
            r"tokenized.input_ids\[2\] is 2147",
        ),
        (lambda it: it.sampling_params.stop_token_ids.append(2**31), r"stop_token_ids\[0\]"),
        (lambda it: setattr(it.sampling_params, "top_k", 2**31), "top_k is 2147483648"),
        (lambda it: setattr(it.sampling_params, "n", 2**31), "n is 2147483648"),
        (lambda it: setattr(it, "data_parallel_rank", 1), "data_parallel_rank is 1"),
        (lambda it: it.ClearField("tokenized"), "input is 'unset'"),
    ],
)
def test_what_cannot_be_said_in_our_words_is_refused(
    change: Callable[[vllm.GenerateRequest], None], words: str
) -> None:
    message = request()
    change(message)
    with pytest.raises(BadRequest, match=words):
        lockstep_request(message)


def test_prompt_and_name_are_taken_over() -> None:
    by_ids = lockstep_request(request())
    assert list(by_ids.token_ids.ids) == [1, 2]
    by_text = lockstep_request(vllm.GenerateRequest(request_id="r", text="hello"))
    assert (by_text.request_id, by_text.text) == ("r", "hello")


def test_the_dialect_is_that_of_a_caller_who_makes_the_text() -> None:
    for skips in (True, False):
        dialect = dialect_of(request(skip_special_tokens=skips))
        assert dialect.clamps_max_tokens and dialect.ids_through_stop
        assert dialect.skip_special_tokens is skips


def test_a_refusal_names_the_field_as_the_caller_does() -> None:
    said = {
        "token_ids.ids[3]": "tokenized.input_ids[3]",
        "prompt[3]": "input[3]",
        "prompt_logprobs": "prompt_logprobs",
        "gbnf_grammar": "grammar",
        "top_p": "top_p",
    }
    for ours, theirs in said.items():
        error = in_callers_words(BadRequest(ours, 7, "less"))
        assert str(error) == f"{theirs} is 7; it must be less"


def test_a_refusal_by_the_engine_names_the_field_as_the_caller_does() -> None:
    for field, message, expected in (
        ("gbnf_grammar", "gbnf_grammar cannot be used: gbnf_grammar?", "grammar cannot be used"),
        ("prompt", "the prompt is empty", "the input is empty"),
        ("request_id", "request_id is 'prompt'", "request_id is 'prompt'"),
        ("", "the queue is full", "the queue is full"),
    ):
        error = in_callers_words(RequestFailed(8, message, 1.5, field))
        assert isinstance(error, RequestFailed)
        assert str(error).startswith(expected)
        assert error.field == {"gbnf_grammar": "grammar", "prompt": "input"}.get(field, field)
        assert (error.status_code, error.retry_after_s) == (8, 1.5)
