"""A request's constraint as a grammar of llguidance."""

import json

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from protos.lockstep.v1 import generate_pb2

_ANY_OBJECT = '{"type": "object"}'


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
        return LLMatcher.grammar_from_json_schema(schema)
    except ValueError as error:
        raise BadDefinition(f"not JSON: {error}") from error


def _lark_of_gbnf(text: str) -> str:
    try:
        return gbnf_to_lark(text)
    except (GbnfToLarkError, ValueError, LookupError, RecursionError) as error:
        raise BadDefinition(f"{type(error).__name__}: {error}") from error
