"""The one thread that touches the device, and the one that waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class DeviceThread:
    """Runs calls in order on one thread. Phases and commands go through the same queue.

    `enter` runs on the thread before its first call: CUDA's current device is a thread's own.
    """

    def __init__(self, name: str, enter: Callable[[], None]) -> None:
        self._executor = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix=name, initializer=enter
        )
        self._began_at: float | None = None

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queues a call; its error is in the future."""
        return self._executor.submit(self._timed, partial(call, *args, **kwargs))

    def busy_s(self) -> float:
        """Seconds for which the present call has been running; 0 if none is. Any thread."""
        began_at = self._began_at
        return 0.0 if began_at is None else time.monotonic() - began_at

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Queues a call and awaits it without blocking the event loop."""
        return await asyncio.wrap_future(self.submit(call, *args, **kwargs))

    def _timed(self, call: Callable[[], T]) -> T:
        self._began_at = time.monotonic()
        try:
            return call()
        finally:
            self._began_at = None

    async def drained(self, timeout_s: float) -> bool:
        """Whether everything queued so far has ended within the limit."""
        marker = asyncio.wrap_future(self.submit(lambda: None))
        done, _ = await asyncio.wait([marker], timeout=timeout_s)
        return bool(done)

    def close(self) -> None:
        """Drops what is queued and does not wait for what runs: the process is about to exit."""
        self._executor.shutdown(wait=False, cancel_futures=True)
