"""Errors to gRPC statuses: the one place that knows which is which."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from coordinator.errors import BadRequest, CoordinatorError, TextUnavailable
from coordinator.frontend.error_details import field_path, status_details
from coordinator.frontend.errors import (
    Draining,
    EngineLost,
    NotReady,
    RequestFailed,
    SlowClient,
    Unauthenticated,
    WrongTenant,
)
from coordinator.frontend.wire import Unparsable

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
# gRFC A6: how long a client's retry policy is to wait.
_PUSHBACK_KEY = "grpc-retry-pushback-ms"


@dataclass(frozen=True)
class Rejection:
    """How an error ends a call.

    `reason` labels the metric of refused requests; None where the engine counts, or nobody can.
    `field` is the request's field at fault. `retry_after_s` 0: at once; None: nobody knows.
    """

    status: grpc.StatusCode
    reason: str | None
    field: str | None = None
    retry_after_s: float | None = None


def rejection_of(error: CoordinatorError) -> Rejection:
    """The status of an error that a call may end with; others are bugs."""
    match error:
        case BadRequest(field=field):
            rejection = Rejection(grpc.StatusCode.INVALID_ARGUMENT, "invalid_argument", field)
        case Unauthenticated():
            rejection = Rejection(grpc.StatusCode.UNAUTHENTICATED, "unauthenticated")
        case WrongTenant():
            rejection = Rejection(grpc.StatusCode.PERMISSION_DENIED, "permission_denied")
        case TextUnavailable():
            rejection = Rejection(grpc.StatusCode.FAILED_PRECONDITION, "failed_precondition")
        case NotReady():
            rejection = Rejection(grpc.StatusCode.UNAVAILABLE, "not_ready")
        case Draining():
            rejection = Rejection(grpc.StatusCode.UNAVAILABLE, "draining")
        case EngineLost():
            rejection = Rejection(grpc.StatusCode.UNAVAILABLE, None)
        case SlowClient():
            rejection = Rejection(grpc.StatusCode.RESOURCE_EXHAUSTED, None, retry_after_s=0.0)
        case RequestFailed(status_code=code, retry_after_s=seconds, field=field):
            status = _CODES[code]
            is_known = seconds > 0 or status is grpc.StatusCode.RESOURCE_EXHAUSTED
            rejection = Rejection(status, None, field or None, seconds if is_known else None)
        case _:
            raise error
    return rejection


def answered(
    method: Callable[[Any, Any], Awaitable[Any]],
    count: Callable[[str], None] | None,
    asked: Descriptor,
) -> Callable[[Message | Unparsable, Any], Awaitable[Message | None]]:
    """Wraps a handler: its errors become statuses, with paths of fields from the message `asked`.

    Refusals are given to `count` by reason; None: they count nowhere.
    """

    async def handler(request: Message | Unparsable, context: Any) -> Message | None:
        try:
            if isinstance(request, Unparsable):
                raise request.error
            response: Message | None = await method(request, context)
            return response
        except CoordinatorError as error:
            rejection, message = rejection_of(error), str(error)
        if rejection.reason is not None and count is not None:
            count(rejection.reason)
        metadata = (*context.trailing_metadata(), *_hints(rejection, message, asked))
        # Not within the except: the error may quote the request, and tracebacks go to the log.
        await context.abort(rejection.status, message, metadata)
        raise AssertionError("abort always raises")

    return handler


def _hints(
    rejection: Rejection, message: str, asked: Descriptor
) -> tuple[tuple[str, str | bytes], ...]:
    """What a client's program can read of why, and of when to try again."""
    field = None if rejection.field is None else field_path(rejection.field, asked)
    details = status_details(rejection.status, message, field, rejection.retry_after_s)
    if not rejection.retry_after_s:
        return details
    return ((_PUSHBACK_KEY, str(round(rejection.retry_after_s * 1000))), *details)
