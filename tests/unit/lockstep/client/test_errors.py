"""Statuses become errors of a class, with what they tell."""

import math
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from lockstep.client.statuses import call_failed, failure
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


class _RpcError(grpc.RpcError):
    """As both stacks of gRPC raise it."""

    def __init__(
        self,
        *metadata: tuple[str, str | bytes],
        code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT,
        details: str = "no",
    ) -> None:
        self._metadata, self._code, self._details = metadata, code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._metadata or None


def _details(*details: Message) -> tuple[str, bytes]:
    status = status_pb2.Status(code=3, message="no")
    for detail in details:
        status.details.add().Pack(detail)
    return "grpc-status-details-bin", status.SerializeToString()


def _retry_info(milliseconds: int) -> error_details_pb2.RetryInfo:
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(milliseconds)
    return info


def test_the_field_at_fault_is_that_of_the_details() -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="sampling_params.top_p")
    bad_request = error_details_pb2.BadRequest(field_violations=[violation])
    assert call_failed(_RpcError(_details(bad_request))).field == "sampling_params.top_p"
    for plain in (_RpcError(), _RpcError(_details()), _RpcError(("other", "x"))):
        error = call_failed(plain)
        assert (error.field, error.retry_delay_s) == (None, None)


def test_the_delay_is_the_pushback_or_else_that_of_the_details() -> None:
    details = _details(_retry_info(2500))
    assert call_failed(_RpcError(details)).retry_delay_s == 2.5
    assert call_failed(_RpcError(("grpc-retry-pushback-ms", "40"), details)).retry_delay_s == 0.04
    never = _RpcError(("grpc-retry-pushback-ms", "-1"), details)
    assert call_failed(never).retry_delay_s == math.inf


@pytest.mark.parametrize(
    ("code", "details", "kind", "words"),
    [
        ("UNAVAILABLE", "failed to connect to all", Unavailable, "is `lockstep serve` running"),
        ("UNAVAILABLE", "failed to connect: WRONG_VERSION_NUMBER", Unavailable, "speaks no TLS"),
        ("UNAVAILABLE", "failed to connect: SETTINGS frame", Unavailable, "no gRPC server"),
        ("UNAVAILABLE", "errors resolving: Failed to parse port", Unavailable, "want HOST:PORT"),
        ("UNAVAILABLE", "Stream removed (Socket closed)", Unavailable, "connection to the server"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", DeadlineExceeded, "timeout_s or --timeout"),
        (
            "DEADLINE_EXCEEDED",
            "Stream removed (Deadline Exceeded)",
            DeadlineExceeded,
            "timeout_s or --timeout",
        ),
        (
            "RESOURCE_EXHAUSTED",
            "SERVER: Received message larger than max (2 vs. 1)",
            InvalidRequest,
            "larger than max",
        ),
    ],
)
def test_grpcs_own_words_are_explained(
    code: str, details: str, kind: type[CallFailed], words: str
) -> None:
    error = call_failed(_RpcError(code=grpc.StatusCode[code], details=details))
    assert type(error) is kind and error.code == code
    assert words in error.message and details in error.message


def test_a_lost_rank_whose_message_was_too_large_is_no_invalid_request() -> None:
    details = "restarting after: RESOURCE_EXHAUSTED: message larger than max (2 vs. 1)"
    metadata = ("grpc-retry-pushback-ms", "500")
    error = call_failed(_RpcError(metadata, code=grpc.StatusCode.UNAVAILABLE, details=details))
    assert type(error) is Unavailable and error.retry_delay_s == 0.5


def test_a_servers_words_are_left_as_they_are() -> None:
    details = "the deadline passed after 3 output tokens"
    error = call_failed(_RpcError(code=grpc.StatusCode.DEADLINE_EXCEEDED, details=details))
    assert error.message == details
