"""Statuses become errors of a class, with what they tell."""

import pytest

from coordinator.errors import BadRequest
from lockstep.client.statuses import failure
from lockstep.errors import (
    AccessDenied,
    CallFailed,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    LockstepError,
    Overloaded,
    Unavailable,
)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("INVALID_ARGUMENT", InvalidRequest),
        ("UNAUTHENTICATED", AccessDenied),
        ("PERMISSION_DENIED", AccessDenied),
        ("RESOURCE_EXHAUSTED", Overloaded),
        ("UNAVAILABLE", Unavailable),
        ("DEADLINE_EXCEEDED", DeadlineExceeded),
        ("CANCELLED", Cancelled),
        ("INTERNAL", CallFailed),
    ],
)
def test_a_code_has_its_class_and_all_are_lockstep_errors(
    code: str, kind: type[CallFailed]
) -> None:
    error = failure(code, "because", 2.0)
    assert type(error) is kind and isinstance(error, LockstepError)
    assert (error.code, error.message, error.retry_delay_s) == (code, "because", 2.0)
    assert str(error) == f"{code}: because"


@pytest.mark.parametrize(
    "field", ["temperature", "stop[0]", "number of prompt tokens", "token_ids"]
)
def test_the_field_at_fault_is_read_from_the_servers_words(field: str) -> None:
    words = str(BadRequest(field, "a is b; it must be c", "at least 0"))
    error = failure("INVALID_ARGUMENT", words)
    assert isinstance(error, InvalidRequest) and error.field == field


def test_words_without_a_field_name_none() -> None:
    error = failure("INVALID_ARGUMENT", "request_id 'x' is in use")
    assert isinstance(error, InvalidRequest) and error.field is None
