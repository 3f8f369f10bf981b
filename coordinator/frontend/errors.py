"""Why a frontend ends a call, beside BadRequest and TextUnavailable.

    CoordinatorError
        Unauthenticated         no API key, or one that is not known
        WrongTenant             the API key is another tenant's
        NotReady                the group cannot answer now
        Draining                this coordinator is stopping
        EngineLost              the engine process is gone or silent
        RequestFailed           the engine ended the request with a status
        SlowClient              the client leaves its output unread

`rejections.py` gives each its gRPC status. TracingUnavailable ends the start.
"""

from coordinator.errors import CoordinatorError


class Unauthenticated(CoordinatorError):
    """The call shows no API key that is known; the message never shows the key."""


class WrongTenant(CoordinatorError):
    """The call is for a tenant that its API key is not of."""


class NotReady(CoordinatorError):
    """The group cannot answer now; the message says why."""


class Draining(CoordinatorError):
    """The coordinator is stopping and takes no new requests."""


class EngineLost(CoordinatorError):
    """The engine process ended, or has been silent for too long."""

    def __init__(self, message: str, is_silent: bool = False) -> None:
        super().__init__(message)
        self.is_silent = is_silent


class RequestFailed(CoordinatorError):
    """The engine ended a request with a gRPC status."""

    def __init__(
        self, status_code: int, message: str, retry_after_s: float, field: str = ""
    ) -> None:
        """`field`: what is at fault in a bad request; "": nothing, or nobody said."""
        super().__init__(message)
        self.status_code = status_code
        self.retry_after_s = retry_after_s
        self.field = field


class SlowClient(CoordinatorError):
    """The client leaves more output unread than we keep for it, for longer than we wait."""

    def __init__(self, num_unread: int, most_unread: int, limit_s: float) -> None:
        super().__init__(
            f"the client reads too slowly: {num_unread} tokens unread, more than {most_unread} "
            f"for over {limit_s:g} s (--slow-client-seconds)"
        )


class TracingUnavailable(CoordinatorError):
    """Tracing is configured and its packages are missing; the message says how to get them."""
