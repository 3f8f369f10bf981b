"""How long a rank had nothing to do."""

from __future__ import annotations


class IdleClock:
    """Time in which no command with steps was running or waiting, from the first step on.

    Told of every step in order, by one thread; times are CLOCK_MONOTONIC in seconds. It is told
    when a step ended only once it has: a command that arrived before that leaves no gap.
    """

    def __init__(self) -> None:
        self._idle_s = 0.0
        self._last_ended: float | None = None

    def step_ended(self, arrived: float, ended: float) -> None:
        """Counts the gap between the step before and the arrival of this step's command."""
        if self._last_ended is not None:
            self._idle_s += max(0.0, arrived - self._last_ended)
        self._last_ended = ended

    def seconds(self, now: float) -> float:
        """Idle time so far, if nothing but idle heartbeats has arrived since the last step."""
        if self._last_ended is None:
            return 0.0
        return self._idle_s + max(0.0, now - self._last_ended)

    @property
    def seconds_before_last_step(self) -> float:
        """Idle time up to the start of the last step that has ended."""
        return self._idle_s
