"""SmolLM2 on two ranks answers in JSON that its schema admits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from protos.lockstep.v1 import generate_pb2
from tests.helpers.message_client import chat_request
from tests.helpers.served_group import ServedGroup

pytestmark = pytest.mark.timeout(300)
_PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_schema_output_validates(smollm2_tp2: ServedGroup, temperature: float) -> None:
    messages = [{"role": "user", "content": "Describe a person in JSON."}]
    request = chat_request(
        messages,
        json_schema=json.dumps(_PERSON),
        temperature=temperature,
        max_tokens=200,
        seed=1,
        logprobs=1,
    )
    with smollm2_tp2.client() as client:
        answer = client.generate_unary(request)
    assert answer.finished.finish_reason == generate_pb2.FINISH_REASON_STOP
    person = json.loads(answer.output.text)
    assert set(person) == {"name", "age"}
    assert isinstance(person["name"], str) and len(person["name"]) <= 20
    assert isinstance(person["age"], int) and 0 <= person["age"] <= 120
    # Log-probabilities are those before the mask, so a forced token may be unlikely.
    assert all(entry.logprob <= 0 for entry in answer.output.logprobs)


def test_choice_is_one_of_them(smollm2_tp2: ServedGroup) -> None:
    choices = ["positive", "negative"]
    request = chat_request(
        [{"role": "user", "content": "Is 'I love it' positive or negative?"}],
        choice=generate_pb2.ChoiceConstraint(choices=choices),
        temperature=0.0,
    )
    with smollm2_tp2.client() as client:
        assert client.generate_unary(request).output.text in choices
