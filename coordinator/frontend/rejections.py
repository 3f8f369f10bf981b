"""Errors to gRPC statuses: the one place that knows which is which."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

from coordinator.errors import BadRequest, CoordinatorError, TextUnavailable
from coordinator.frontend.errors import Draining, EngineLost, NotReady, RequestFailed, SlowClient
from coordinator.frontend.wire import Unparsable

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
# gRFC A6: how long a client's retry policy is to wait.
_PUSHBACK_KEY = "grpc-retry-pushback-ms"


@dataclass(frozen=True)
class Rejection:
    """How an error ends a call.

    `reason` labels the metric of refused requests; None where the engine counts, or nobody can.
    """

    status: grpc.StatusCode
    reason: str | None
    retry_after_s: float = 0.0


def rejection_of(error: CoordinatorError) -> Rejection:
    """The status of an error that a call may end with; others are bugs."""
    match error:
        case BadRequest():
            rejection = Rejection(grpc.StatusCode.INVALID_ARGUMENT, "invalid_argument")
        case TextUnavailable():
            rejection = Rejection(grpc.StatusCode.FAILED_PRECONDITION, "failed_precondition")
        case NotReady():
            rejection = Rejection(grpc.StatusCode.UNAVAILABLE, "not_ready")
        case Draining():
            rejection = Rejection(grpc.StatusCode.UNAVAILABLE, "draining")
        case EngineLost():
            rejection = Rejection(grpc.StatusCode.UNAVAILABLE, None)
        case SlowClient():
            rejection = Rejection(grpc.StatusCode.RESOURCE_EXHAUSTED, None)
        case RequestFailed(status_code=code, retry_after_s=retry_after_s):
            rejection = Rejection(_CODES[code], None, retry_after_s)
        case _:
            raise error
    return rejection


def answered(
    method: Callable[[Any, Any], Awaitable[Any]], count: Callable[[str], None]
) -> Callable[[Message | Unparsable, Any], Awaitable[Message | None]]:
    """Wraps a handler: its errors become statuses, and refusals are given to `count` by reason."""

    async def handler(request: Message | Unparsable, context: Any) -> Message | None:
        try:
            if isinstance(request, Unparsable):
                raise request.error
            response: Message | None = await method(request, context)
            return response
        except CoordinatorError as error:
            rejection = rejection_of(error)
            if rejection.reason is not None:
                count(rejection.reason)
            pushback: tuple[tuple[str, str], ...] = ()
            if rejection.retry_after_s > 0:
                pushback = ((_PUSHBACK_KEY, str(round(rejection.retry_after_s * 1000))),)
            metadata = (*context.trailing_metadata(), *pushback)
            await context.abort(rejection.status, str(error), metadata)
            raise AssertionError("abort always raises") from error

    return handler
