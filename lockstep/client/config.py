"""How a client reaches its server, how long it waits and how often it tries."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.errors import ConfigError

_DEFAULT_LIMIT_S = 600.0
_DEFAULT_INFO_LIMIT_S = 30.0


# Above the classes, whose defaults are made with them.
def _check_seconds(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name} is {value}; it must be above 0 and finite")


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Encrypts the connection. Files are PEM; they are read when the client is made."""

    ca: Path | None = None
    """Certificates that the server's must come from. None: those that gRPC brings."""
    cert: Path | None = None
    """Our own certificate, with its chain, where the server wants one. Needs `key`."""
    key: Path | None = None
    server_name: str | None = None
    """Name to expect in the server's certificate. None: the host of the address."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            given, missing = ("key", "cert") if self.cert is None else ("cert", "key")
            raise ConfigError(f"TLS: {given} is given without {missing}; they belong together")


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """When a call is tried again: UNAVAILABLE, and RESOURCE_EXHAUSTED where the server says when.

    The k-th wait is drawn evenly between half and the whole of `initial_backoff_s` * 2**(k-1), at
    most `max_backoff_s`; a delay that the server asks for is waited out first. Whatever would not
    end before the call's deadline is not begun.
    """

    max_attempts: int = 4
    """Of one call; 1: never again. Of a stream that resumes: without a token in between."""
    initial_backoff_s: float = 0.25
    max_backoff_s: float = 8.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ConfigError(f"max_attempts is {self.max_attempts}; it must be at least 1")
        for name in ("initial_backoff_s", "max_backoff_s"):
            _check_seconds(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """Everything about a client but the address. Raises ConfigError for what cannot be meant."""

    tls: Tls | None = None
    """None: no encryption."""
    api_key: str | None = field(default=None, repr=False)
    """Sent as `authorization: Bearer KEY` with every call; readable on the way without `tls`."""
    timeout_s: float = _DEFAULT_LIMIT_S
    """Limit of a generation, all attempts included, when the call names none."""
    info_timeout_s: float = _DEFAULT_INFO_LIMIT_S
    """Limit of Abort and the info calls."""
    retry: RetryPolicy = RetryPolicy()
    resume: bool = False
    """Whether a stream that breaks goes on from the tokens that were delivered."""

    def __post_init__(self) -> None:
        _check_seconds("timeout_s", self.timeout_s)
        _check_seconds("info_timeout_s", self.info_timeout_s)
        # gRPC's own words for such a header name neither the key nor what is wrong with it.
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError("api_key must be of printable ASCII characters without spaces")
