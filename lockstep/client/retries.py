"""Whether and when a call is tried again. No I/O: the clients do the waiting."""

import math
import random
import time
from collections.abc import Callable, Iterable

from lockstep.client.config import RetryPolicy
from lockstep.client.statuses import failure
from lockstep.errors import CallFailed, Overloaded, Unavailable

# Trailing metadata: milliseconds to the first token; 0 or absent without one.
_PREFILL_KEY = "lockstep-prefill-ms"


class Retries:
    """The attempts of one call within its deadline. For one thread."""

    def __init__(
        self,
        policy: RetryPolicy,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Raises ValueError for a limit of no time, or of no end."""
        if not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise ValueError(f"timeout_s is {timeout_s}; it must be above 0 and finite")
        self._policy = policy
        self._clock = clock
        self._draw = draw
        self._deadline = clock() + timeout_s
        self._num_failures = 0

    def remaining_s(self) -> float:
        """What is left for the next attempt. Raises DeadlineExceeded if nothing is."""
        remaining_s = self._deadline - self._clock()
        if remaining_s <= 0:
            raise failure("DEADLINE_EXCEEDED", "the call's limit passed between two attempts")
        return remaining_s

    def note_progress(self) -> None:
        """Tokens came: what failed before them no longer counts."""
        self._num_failures = 0

    def delay_s(self, error: CallFailed) -> float:
        """Seconds to wait before the next attempt; raises `error` if there is to be none."""
        self._num_failures += 1
        if not is_retryable(error) or self._num_failures >= self._policy.max_attempts:
            raise error
        backoff_s = min(
            self._policy.max_backoff_s,
            self._policy.initial_backoff_s * 2 ** (self._num_failures - 1),
        )
        delay_s = (error.retry_delay_s or 0.0) + self._draw(backoff_s / 2, backoff_s)
        if self._clock() + delay_s >= self._deadline:
            raise error
        return delay_s


def is_retryable(error: CallFailed) -> bool:
    """The same call may well be served later.

    RESOURCE_EXHAUSTED without a delay is a call that is too large or was read too slowly: it would
    end the same way again.
    """
    return isinstance(error, Unavailable) or (
        isinstance(error, Overloaded) and error.retry_delay_s is not None
    )


def require_no_output(
    error: CallFailed, metadata: Iterable[tuple[str, str | bytes]] | None
) -> None:
    """Raises the error of a unary call whose trailing metadata say that it had its first token."""
    if float(dict(metadata or ()).get(_PREFILL_KEY, 0)) > 0:
        raise error
