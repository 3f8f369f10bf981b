"""When a failed call is tried again, by a clock of the test's own."""

import math

import pytest

from lockstep.client.config import RetryPolicy
from lockstep.client.retries import Retries, is_retryable, require_no_output
from lockstep.client.statuses import failure
from lockstep.errors import CallFailed, DeadlineExceeded

_AWAY = failure("UNAVAILABLE", "not ready")
_POLICY = RetryPolicy(max_attempts=5, initial_backoff_s=1.0, max_backoff_s=3.0)


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _retries(timeout_s: float = 1000.0, clock: _Clock | None = None, at: float = 1.0) -> Retries:
    """`at`: where in its range each wait is drawn, 0 to 1."""
    return Retries(
        _POLICY, timeout_s, clock or _Clock(), draw=lambda low, high: low + at * (high - low)
    )


def test_waits_double_up_to_their_limit_and_attempts_end() -> None:
    retries = _retries()
    assert [retries.delay_s(_AWAY) for _ in range(4)] == [1.0, 2.0, 3.0, 3.0]
    with pytest.raises(CallFailed) as caught:
        retries.delay_s(_AWAY)
    assert caught.value is _AWAY


def test_a_wait_is_drawn_from_the_upper_half() -> None:
    retries = _retries(at=0.0)
    assert [retries.delay_s(_AWAY) for _ in range(2)] == [0.5, 1.0]


def test_the_servers_delay_is_waited_out_before_the_drawn_one() -> None:
    full = failure("RESOURCE_EXHAUSTED", "the queue is full", retry_delay_s=7.0)
    assert _retries().delay_s(full) == 8.0
    assert _retries(at=0.0).delay_s(full) == 7.5


def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    full = failure("RESOURCE_EXHAUSTED", "the queue is full", retry_delay_s=7.0)
    with pytest.raises(CallFailed, match="the queue is full"):
        _retries(timeout_s=7.9).delay_s(full)
    assert _retries(timeout_s=8.1).delay_s(full) == 8.0


def test_never_is_never() -> None:
    with pytest.raises(CallFailed):
        _retries().delay_s(failure("UNAVAILABLE", "draining", retry_delay_s=math.inf))


def test_tokens_in_between_begin_the_count_anew() -> None:
    retries = _retries()
    for _ in range(3):
        assert [retries.delay_s(_AWAY) for _ in range(4)] == [1.0, 2.0, 3.0, 3.0]
        retries.note_progress()


def test_remaining_time_is_the_deadlines_and_runs_out() -> None:
    clock = _Clock()
    retries = _retries(10.0, clock)
    clock.now += 4
    assert retries.remaining_s() == 6.0
    clock.now += 6
    with pytest.raises(DeadlineExceeded):
        retries.remaining_s()


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.inf, math.nan])
def test_a_limit_that_is_none_is_refused(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s is"):
        _retries(timeout_s)


@pytest.mark.parametrize(
    ("code", "retry_delay_s", "expected"),
    [
        ("UNAVAILABLE", None, True),
        ("UNAVAILABLE", 1.0, True),
        ("RESOURCE_EXHAUSTED", 1.0, True),
        ("RESOURCE_EXHAUSTED", None, False),
        ("INTERNAL", 1.0, False),
        ("INVALID_ARGUMENT", None, False),
        ("DEADLINE_EXCEEDED", None, False),
        ("UNAUTHENTICATED", None, False),
        ("CANCELLED", None, False),
        ("ABORTED", None, False),
    ],
)
def test_only_what_may_pass_is_tried_again(
    code: str, retry_delay_s: float | None, expected: bool
) -> None:
    assert is_retryable(failure(code, "x", retry_delay_s)) is expected


def test_a_unary_call_that_had_its_first_token_is_not_tried_again() -> None:
    require_no_output(_AWAY, None)
    require_no_output(_AWAY, (("lockstep-prefill-ms", "0.000"),))
    with pytest.raises(CallFailed):
        require_no_output(_AWAY, (("lockstep-prefill-ms", "12.500"),))
