"""A request's constraint as a grammar of llguidance."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from protos.lockstep.v1 import generate_pb2

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_ANY_OBJECT = '{"type": "object"}'
# As JSON has it, but bounded: small models go on with white space for ever. A schema can say
# otherwise in its "x-guidance".
_JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}


class BadDefinition(ValueError):
    """A constraint's definition is at fault; the message says how."""


def grammar_of(params: generate_pb2.SamplingParams) -> str:
    """What LLMatcher takes. Raises BadDefinition; what it finds out later LLMatcher itself says."""
    match params.WhichOneof("constraint"):
        case "json_schema":
            return _of_schema(params.json_schema)
        case "json_object":
            return _of_schema(_ANY_OBJECT)
        case "regex":
            return LLMatcher.grammar_from_regex(params.regex)
        case "lark_grammar":
            return LLMatcher.grammar_from_lark(params.lark_grammar)
        case "choice":
            texts = " | ".join(
                json.dumps(text, ensure_ascii=False) for text in params.choice.choices
            )
            return LLMatcher.grammar_from_lark(f"start: {texts}")
        case "gbnf_grammar":
            return LLMatcher.grammar_from_lark(_lark_of_gbnf(params.gbnf_grammar))
    raise BadDefinition("no constraint is set")


def _of_schema(schema: str) -> str:
    try:
        parsed = json.loads(schema)
        if parsed is True:
            schema = "{}"
        elif not isinstance(parsed, dict):
            raise BadDefinition("a schema must be a JSON object, or true")
        return LLMatcher.grammar_from_json_schema(schema, defaults=_JSON_OPTIONS)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadDefinition(f"not JSON: {error}") from error
    except ValueError as error:
        raise BadDefinition(str(error)) from error


def _lark_of_gbnf(text: str) -> str:
    # The library raises bare Exception for some of what it cannot read; nothing carries on here.
    try:
        return gbnf_to_lark(text)
    except Exception as error:
        raise BadDefinition(str(error)) from error
