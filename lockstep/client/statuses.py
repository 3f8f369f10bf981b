"""gRPC statuses to CallFailed: the one place of the client that knows which is which."""

import math
from collections.abc import Mapping
from typing import Any

from google.rpc import error_details_pb2, status_pb2

from lockstep.errors import (
    AccessDenied,
    CallFailed,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    Unavailable,
)

_KINDS: dict[str, type[CallFailed]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "UNAUTHENTICATED": AccessDenied,
    "PERMISSION_DENIED": AccessDenied,
    "RESOURCE_EXHAUSTED": Overloaded,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": Cancelled,
}
# How gRPC's own words begin when nobody is there; a server's own may quote them further on.
_NO_CONNECTION = ("failed to connect", "DNS resolution failed", "errors resolving")
_IS_IT_RUNNING = "is `lockstep serve` running there?"
_HINTS = {
    "WRONG_VERSION_NUMBER": "what listens there speaks no TLS",
    "SETTINGS frame": "what listens there is no gRPC server, or wants TLS",
    "Failed to parse port": "want HOST:PORT",
}
_STREAM_BROKE = "Stream removed"
_LATE = ("Deadline Exceeded", "Deadline Exceeded)")
_TOO_LARGE = "message larger than max"
# gRFC A6: milliseconds after which to try again; anything but a number from 0 up means never.
_PUSHBACK_KEY = "grpc-retry-pushback-ms"
# A google.rpc.Status with details.
_DETAILS_KEY = "grpc-status-details-bin"


def call_failed(error: Any) -> CallFailed:
    """What to raise for a grpc.RpcError of either stack."""
    code, details = error.code().name, error.details() or "no details"
    if code == "RESOURCE_EXHAUSTED" and _TOO_LARGE in details:
        return InvalidRequest(code, details)
    metadata = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(metadata.get(_DETAILS_KEY, b""))
    return failure(
        code, _explained(code, details), _retry_delay_s(metadata, status), _field_at_fault(status)
    )


def _explained(code: str, details: str) -> str:
    """gRPC's own words with what they mean here; a server's words as they are."""
    if code == "UNAVAILABLE" and details.startswith(_NO_CONNECTION):
        hints = (hint for words, hint in _HINTS.items() if words in details)
        return f"no server answers ({details}); {next(hints, _IS_IT_RUNNING)}"
    if code == "UNAVAILABLE" and details.startswith(_STREAM_BROKE):
        return f"the connection to the server broke ({details})"
    if code == "DEADLINE_EXCEEDED" and details.endswith(_LATE):
        return f"the call's time limit has passed, timeout_s or --timeout ({details})"
    return details


def failure(
    code: str, message: str, retry_delay_s: float | None = None, field: str | None = None
) -> CallFailed:
    """An error of the class that the code has."""
    return _KINDS.get(code, CallFailed)(code, message, retry_delay_s, field)


def _retry_delay_s(metadata: Mapping[str, Any], status: Any) -> float | None:
    pushback = metadata.get(_PUSHBACK_KEY)
    if pushback is not None:
        return int(pushback) / 1000 if pushback.isdecimal() else math.inf
    retry = error_details_pb2.RetryInfo()
    if any(detail.Unpack(retry) for detail in status.details):
        return float(retry.retry_delay.ToMicroseconds()) / 1e6
    return None


def _field_at_fault(status: Any) -> str | None:
    bad_request = error_details_pb2.BadRequest()
    if any(detail.Unpack(bad_request) for detail in status.details):
        return next((violation.field for violation in bad_request.field_violations), None)
    return None
