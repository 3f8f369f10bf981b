"""What a client forces on the output, through the gateway: schema, tool, expression, grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from tests.helpers.served_group import ServedGroup

pytestmark = [pytest.mark.http, pytest.mark.timeout(240)]

MODEL = "smol"
_LIMIT_S = 100.0
_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
_WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
_TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": _WEATHER}}]
_FORCED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def client(group: ServedGroup) -> Iterator[openai.OpenAI]:
    url = f"http://{group.http}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=_LIMIT_S) as client:
        yield client


def chat(client: openai.OpenAI, text: str, **params: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": text}],
        **{"temperature": 0, "max_tokens": 80, **params},
    )


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}


def test_without_a_schema_the_same_prompt_gives_no_json(client: openai.OpenAI) -> None:
    """Guards the tests below."""
    answer = chat(client, "Name a person and their age.", max_tokens=16)
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.choices[0].message.content)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_schema_output_validates(client: openai.OpenAI, temperature: float) -> None:
    (choice,) = chat(
        client,
        "Name a person and their age.",
        response_format=schema_format(_PERSON),
        temperature=temperature,
        seed=3,
    ).choices
    jsonschema.validate(json.loads(choice.message.content), _PERSON)
    assert choice.finish_reason == "stop"


def test_a_forced_tool_is_called_with_valid_arguments(client: openai.OpenAI) -> None:
    answer = chat(client, "What is the weather in Paris?", tools=_TOOLS, tool_choice=_FORCED)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), _WEATHER)
    assert answer.choices[0].finish_reason == "tool_calls"


def test_a_forced_tool_is_called_in_a_stream_as_well(client: openai.OpenAI) -> None:
    chunks = chat(
        client, "What is the weather in Paris?", tools=_TOOLS, tool_choice=_FORCED, stream=True
    )
    deltas = [
        call.function
        for chunk in chunks
        for choice in chunk.choices
        for call in choice.delta.tool_calls or ()
    ]
    assert "weather" in {delta.name for delta in deltas}
    arguments = "".join(delta.arguments or "" for delta in deltas)
    jsonschema.validate(json.loads(arguments), _WEATHER)


def test_regular_expressions_and_grammars_are_followed(client: openai.OpenAI) -> None:
    matched = chat(client, "Say something.", extra_body={"regex": "[a-c]{3}"})
    assert re.fullmatch("[a-c]{3}", matched.choices[0].message.content)
    spoken = chat(client, "Is water wet?", extra_body={"ebnf": 'root ::= "yes" | "no"'})
    assert spoken.choices[0].message.content in ("yes", "no")


def test_a_schema_that_is_none_is_refused_by_its_name(client: openai.OpenAI) -> None:
    wrong = schema_format({"type": "nonsense"})
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        chat(client, "Name a person.", response_format=wrong)
