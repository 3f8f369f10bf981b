"""When streams hear of their news: at once while there is room, together and later under load.

A message costs a frontend some ten times as much as a token in it. So when messages take up more
than half of the event loop's time, the next ones wait until the loop has rested as long as it has
worked, and the tokens that come meanwhile join them.
"""

import asyncio
import time
from collections.abc import Callable

# Most that pacing adds to a token's way to its client.
_MAX_CYCLE_S = 0.016
_CYCLE_PER_WORK = 2.0


class Pacer:
    """Wakes streams in cycles. On one event loop, whose thread's CPU time is what it goes by."""

    def __init__(self, cpu_clock: Callable[[], float] = time.thread_time) -> None:
        self._cpu_clock = cpu_clock
        self._waiting: list[Callable[[], None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._next_wake = 0.0
        self._cpu_at_wake = cpu_clock()

    def add(self, wake: Callable[[], None]) -> None:
        """Has `wake` called by this cycle's end."""
        self._waiting.append(wake)

    def settle(self) -> None:
        """Wakes what was added, or sees to it that it is woken when this cycle is over."""
        if not self._waiting or self._timer is not None:
            return
        loop = asyncio.get_running_loop()
        if loop.time() >= self._next_wake:
            self._wake_all()
        else:
            self._timer = loop.call_at(self._next_wake, self._wake_all)

    def _wake_all(self) -> None:
        self._timer = None
        cpu = self._cpu_clock()
        work_s, self._cpu_at_wake = cpu - self._cpu_at_wake, cpu
        cycle_s = min(work_s * _CYCLE_PER_WORK, _MAX_CYCLE_S)
        self._next_wake = asyncio.get_running_loop().time() + cycle_s
        waiting, self._waiting = self._waiting, []
        for wake in waiting:
            wake()
