"""Every kind of constraint allows what it says, to its end, and what is wrong is named."""

import json
from typing import Any

import pytest
from llguidance import LLTokenizer

from coordinator.grammar.matchers import Matchers
from protos.lockstep.v1 import generate_pb2, grammar_pb2
from tests.helpers.fake_tables import allowed_ids
from tests.unit.coordinator.grammar.small_grammar import (
    EOS,
    VOCAB_SIZE,
    allowed_texts,
    packed,
    read_tokenizer,
    write_model,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LLTokenizer:
    return read_tokenizer(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def matchers(tokenizer: LLTokenizer) -> Matchers:
    return Matchers(tokenizer, VOCAB_SIZE)


def opened(
    matchers: Matchers, key: int = 1, output_ids: bytes = b"", **params: Any
) -> grammar_pb2.GrammarReply:
    request = grammar_pb2.OpenGrammar(
        key=key, params=generate_pb2.SamplingParams(**params), output_ids=output_ids
    )
    reply = matchers.answer(grammar_pb2.GrammarRequest(open=request))
    assert reply is not None and reply.key == key
    return reply


def advanced(matchers: Matchers, token_id: int, key: int = 1) -> grammar_pb2.GrammarReply:
    request = grammar_pb2.AdvanceGrammar(key=key, token_id=token_id)
    reply = matchers.answer(grammar_pb2.GrammarRequest(advance=request))
    assert reply is not None and reply.key == key
    return reply


def is_accepted(matchers: Matchers, tokenizer: LLTokenizer, text: str, **params: Any) -> bool:
    """Whether the masks allow `text` token by token and then the end."""
    reply = opened(matchers, **params)
    for token_id in [*tokenizer.tokenize_str(text), EOS]:
        assert not reply.status_code, reply.status_message
        if token_id not in allowed_ids(reply.mask):
            return False
        if token_id != EOS:
            reply = advanced(matchers, token_id)
    return True


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"age": {"type": "integer"}, "name": {"type": "string"}},
        "required": ["age"],
        "additionalProperties": False,
    }
)
CHOICE = generate_pb2.ChoiceConstraint(choices=['say "hi"', "two\nlines", "世界", "two"])


@pytest.mark.parametrize(
    ("params", "good", "bad"),
    [
        ({"json_schema": SCHEMA}, ['{"age": 3}', '{\n "age":3,"name":"x"}'], ["{}", '{"a":1}']),
        ({"json_schema": "true"}, ["3", '[{"a":null}]'], ["", "a"]),
        ({"json_object": True}, ["{}", '{"a":[1,{"b":null}]}'], ["[]", "3", '{"a"}']),
        ({"regex": "[0-9]{2}-x?"}, ["12-", "12-x"], ["12", "12-xx", ""]),
        ({"lark_grammar": 'start: "a" ("b" | "c")+'}, ["ab", "acbc"], ["a", "b"]),
        ({"choice": CHOICE}, list(CHOICE.choices), ["tw", "hi", ""]),
        ({"gbnf_grammar": 'root ::= "yes" | "no" [0-9]+'}, ["yes", "no42"], ["no", "yes1"]),
    ],
    ids=["json_schema", "any json", "json_object", "regex", "lark", "choice", "gbnf"],
)
def test_masks_lead_to_what_is_meant_and_to_nothing_else(
    matchers: Matchers,
    tokenizer: LLTokenizer,
    params: dict[str, Any],
    good: list[str],
    bad: list[str],
) -> None:
    assert all(is_accepted(matchers, tokenizer, text, **params) for text in good)
    assert not any(is_accepted(matchers, tokenizer, text, **params) for text in bad)


def test_white_space_in_json_ends(matchers: Matchers, tokenizer: LLTokenizer) -> None:
    assert not is_accepted(matchers, tokenizer, "{" + " " * 65 + "}", json_object=True)


def test_the_end_may_come_where_the_text_is_whole_and_must_come_where_nothing_follows(
    matchers: Matchers, tokenizer: LLTokenizer
) -> None:
    [a, b] = tokenizer.tokenize_str("ab")
    assert allowed_texts(tokenizer, opened(matchers, regex="ab?").mask) == {"a"}
    assert allowed_texts(tokenizer, advanced(matchers, a).mask) == {"b", "EOS"}
    assert allowed_texts(tokenizer, advanced(matchers, b).mask) == {"EOS"}


def test_min_tokens_puts_the_end_off_but_not_past_the_whole(
    matchers: Matchers, tokenizer: LLTokenizer
) -> None:
    [a, b] = tokenizer.tokenize_str("ab")
    opened(matchers, regex="ab?", min_tokens=5, stop_token_ids=[EOS])
    assert allowed_texts(tokenizer, advanced(matchers, a).mask) == {"b"}
    assert allowed_texts(tokenizer, advanced(matchers, b).mask) == {"EOS"}


def test_an_output_goes_on_where_it_was_and_beside_others(
    matchers: Matchers, tokenizer: LLTokenizer
) -> None:
    [a, b] = tokenizer.tokenize_str("ab")
    opened(matchers, key=1, regex="abc")
    resumed = opened(matchers, key=2, regex="abc", output_ids=packed(a, b))
    assert allowed_texts(tokenizer, resumed.mask) == {"c"}
    assert allowed_texts(tokenizer, advanced(matchers, a, key=1).mask) == {"b"}
    matchers.answer(grammar_pb2.GrammarRequest(close=grammar_pb2.CloseGrammar(key=1)))
    assert allowed_texts(tokenizer, opened(matchers, key=3, regex="abc").mask) == {"a"}


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"regex": "a(b"}, ["regex cannot be used", "unclosed group"]),
        ({"regex": "(?=a)b"}, ["regex cannot be used", "look-ahead"]),
        ({"json_schema": "{"}, ["json_schema cannot be used", "not JSON"]),
        ({"json_schema": "[1]"}, ["json_schema cannot be used", "JSON object, or true"]),
        ({"json_schema": '{"not": {}}'}, ["json_schema cannot be used", "not"]),
        ({"json_schema": "false"}, ["json_schema cannot be used", "JSON object, or true"]),
        ({"json_schema": '{"enum": []}'}, ["json_schema cannot be used", "Unsatisfiable"]),
        ({"lark_grammar": "start: foo"}, ["lark_grammar cannot be used", "foo"]),
        ({"gbnf_grammar": "root := 1"}, ["gbnf_grammar cannot be used", "Expected ::="]),
        ({"gbnf_grammar": "root ::= x"}, ["gbnf_grammar cannot be used", "'x' not found"]),
        ({"gbnf_grammar": "root ::= " + "(" * 5000}, ["gbnf_grammar cannot be used"]),
        ({"regex": "ab", "output_ids": packed(5)}, ["output token 1 does not fit"]),
    ],
)
def test_what_cannot_be_met_is_invalid_and_named(
    matchers: Matchers, params: dict[str, Any], words: list[str]
) -> None:
    reply = opened(matchers, **params)
    assert reply.status_code == 3 and not reply.HasField("mask")
    assert all(word in reply.status_message for word in words), reply.status_message
    assert len(reply.status_message) <= 400
    assert not opened(matchers, key=2, regex="a").status_code
