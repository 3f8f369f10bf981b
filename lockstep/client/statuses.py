"""gRPC statuses to CallFailed: the one place of the client that knows which is which."""

import math
from collections.abc import Iterable
from typing import Any

import grpc

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
# gRFC A6: milliseconds after which to try again; anything but a number from 0 up means never.
_PUSHBACK_KEY = "grpc-retry-pushback-ms"


def call_failed(error: Any) -> CallFailed:
    """What to raise for a grpc.RpcError of either stack."""
    details = error.details() or "no details"
    if error.code() is grpc.StatusCode.UNAVAILABLE and details.startswith(_NO_CONNECTION):
        details = f"no server answers ({details}); is `lockstep serve` running there?"
    return failure(error.code().name, details, _retry_delay_s(error.trailing_metadata() or ()))


def failure(code: str, message: str, retry_delay_s: float | None = None) -> CallFailed:
    """An error of the class that the code has."""
    return _KINDS.get(code, CallFailed)(code, message, retry_delay_s)


def _retry_delay_s(metadata: Iterable[tuple[str, str | bytes]]) -> float | None:
    for key, value in metadata:
        if key == _PUSHBACK_KEY:
            return int(value) / 1000 if str(value).isdecimal() else math.inf
    return None
