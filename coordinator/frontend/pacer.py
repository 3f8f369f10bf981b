"""When streams hear of their news: at once while there is room, together and later under load.

A message costs a frontend some ten times as much as a token in it. So when messages take up more
than half of the event loop's time, the next ones wait until the loop has rested as long as it has
worked, and the tokens that come meanwhile join them. A loop that has little to do makes nobody
wait, whatever it did before: the first token of a lone request goes out at once.
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
        self._woke_at = float("-inf")
        self._cpu_at_wake = cpu_clock()

    def add(self, wake: Callable[[], None]) -> None:
        """Has `wake` called by this cycle's end."""
        self._waiting.append(wake)

    def settle(self) -> None:
        """Wakes what was added, or sees to it that it is woken when this cycle is over.

        A cycle is over when twice the time has passed that the loop has worked since it began.
        """
        if not self._waiting or self._timer is not None:
            return
        loop = asyncio.get_running_loop()
        work_s = self._cpu_clock() - self._cpu_at_wake
        ends_at = self._woke_at + min(work_s * _CYCLE_PER_WORK, _MAX_CYCLE_S)
        if loop.time() >= ends_at:
            self._wake_all(loop.time())
        else:
            self._timer = loop.call_at(ends_at, self._look_again)

    def _look_again(self) -> None:
        """The loop may have worked on meanwhile, and the cycle become longer."""
        self._timer = None
        self.settle()

    def _wake_all(self, now: float) -> None:
        self._woke_at, self._cpu_at_wake = now, self._cpu_clock()
        waiting, self._waiting = self._waiting, []
        for wake in waiting:
            wake()
