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

    def __init__(self, *metadata: tuple[str, str | bytes]) -> None:
        self._metadata = metadata

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.INVALID_ARGUMENT

    def details(self) -> str:
        return "no"

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
