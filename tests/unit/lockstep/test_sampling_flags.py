"""Flags of a request become the fields that were given, and no others."""

import argparse

import pytest

from lockstep.client import GenerateRequest, SamplingParams
from lockstep.client.wire import request_message
from lockstep.sampling_flags import add_sampling_flags, sampling_params
from protos.lockstep.v1 import generate_pb2


def parsed(*words: str) -> generate_pb2.SamplingParams:
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser)
    params = SamplingParams(**sampling_params(parser.parse_args(words)))
    return request_message(GenerateRequest("", params)).sampling_params


def test_nothing_given_is_nothing_set() -> None:
    assert parsed() == generate_pb2.SamplingParams()


def test_biases_bad_words_and_stops() -> None:
    words = ("--logit-bias", "5=-1.5", "--logit-bias", "7=2", "--bad-word", "no", "--bad-word", "x")
    params = parsed(*words, "--stop", "END", "--include-stop")
    assert dict(params.logit_bias) == {5: -1.5, 7: 2.0}
    assert list(params.bad_words) == ["no", "x"]
    assert list(params.stop) == ["END"] and params.include_stop


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("--json-schema", "{}"), "json_schema"),
        (("--json-object",), "json_object"),
        (("--regex", "a*"), "regex"),
        (("--choice", "a", "--choice", "b"), "choice"),
    ],
)
def test_constraints(words: tuple[str, ...], kind: str) -> None:
    params = parsed(*words)
    assert params.WhichOneof("constraint") == kind
    assert list(params.choice.choices) == (["a", "b"] if kind == "choice" else [])


def test_two_constraints_and_a_bias_that_is_none_are_refused() -> None:
    for words in (("--regex", "a", "--json-object"), ("--logit-bias", "5")):
        with pytest.raises(SystemExit):
            parsed(*words)
