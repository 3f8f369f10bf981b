"""What can go wrong on the outside of the product. Each message is one line and says what to do.

LockstepError
├── DemoModelError, HubError, ConfigError
└── CallFailed              a call ended with a status; these have a class of their own:
    ├── InvalidRequest      INVALID_ARGUMENT: a field, named, has a value outside its limit;
    │                       RESOURCE_EXHAUSTED: the request is larger than a message may be
    ├── AccessDenied        UNAUTHENTICATED, PERMISSION_DENIED: the key or certificate
    ├── Overloaded          RESOURCE_EXHAUSTED: try again after `retry_delay_s`
    ├── Unavailable         UNAVAILABLE: no server, not ready, or a rank was lost
    ├── DeadlineExceeded    DEADLINE_EXCEEDED: the call's own limit has passed
    └── Cancelled           CANCELLED: closed or cancelled on our side
"""


class LockstepError(Exception):
    """Base of everything this package raises on purpose."""


class DemoModelError(LockstepError):
    """The demo model could not be fetched, converted or found."""


class HubError(LockstepError):
    """A model could not be resolved or fetched from a model hub."""


class ConfigError(LockstepError):
    """The settings of a command do not fit together or this host."""


class AddressInUse(LockstepError):
    """Something else listens where this was told to."""


class CallFailed(LockstepError):
    """A call ended with a status. Its text is `code`: `message`."""

    def __init__(
        self,
        code: str,
        message: str,
        retry_delay_s: float | None = None,
        field: str | None = None,
    ) -> None:
        """`code` is the name of the gRPC status, "UNAVAILABLE" for example."""
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retry_delay_s = retry_delay_s
        """Seconds after which to try again, by the server; inf: never; None: it does not say."""
        self.field = field
        """Path of the request's field at fault ("sampling_params.top_p"); None if none is named."""


class InvalidRequest(CallFailed):
    """The server refuses a value."""


class AccessDenied(CallFailed):
    """The server does not know us, or does not let us."""


class Overloaded(CallFailed):
    """The server takes no more for now, or this client took too long to read."""


class Unavailable(CallFailed):
    """Nobody answers there, the server is not ready, or it lost what the call ran on."""


class DeadlineExceeded(CallFailed):
    """The call's limit passed before its end."""


class Cancelled(CallFailed):
    """The call was cancelled or its client closed."""
