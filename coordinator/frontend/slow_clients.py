"""Cuts clients that leave their output unread, so that nobody's memory grows with their silence.

How much piles up here before that: gRPC takes a message off our hands when the client's HTTP/2
window has room for it. Until the window is full (64 KiB, or what it has grown to) a client that
does not read is not noticed; from then on `context.write` waits and tokens gather in CallStreams.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from coordinator.frontend.errors import SlowClient
from coordinator.frontend.stream import CallStreams

MAX_UNREAD_TOKENS = 256
_MAX_PERIOD_S = 1.0


class SlowClientWatch:
    """Ends calls with more than MAX_UNREAD_TOKENS unread for longer than `limit_s` seconds.

    On one event loop; `run` looks at all calls about once a second.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._watched: dict[CallStreams, asyncio.Timeout] = {}

    async def run(self) -> None:
        """Looks until it is cancelled."""
        while True:
            await asyncio.sleep(min(_MAX_PERIOD_S, self._limit_s / 4))
            self._look(time.monotonic())

    @contextlib.asynccontextmanager
    async def watch(self, streams: CallStreams) -> AsyncIterator[None]:
        """Watches over the block, which writes what it takes of `streams`. Raises SlowClient."""
        try:
            async with asyncio.timeout(None) as cut:
                self._watched[streams] = cut
                try:
                    yield
                finally:
                    del self._watched[streams]
        except TimeoutError:
            raise SlowClient(streams.num_unread, MAX_UNREAD_TOKENS, self._limit_s) from None

    def _look(self, now: float) -> None:
        for streams, cut in self._watched.items():
            if streams.num_unread <= MAX_UNREAD_TOKENS:
                continue
            if streams.unread_since is None:
                streams.unread_since = now
            elif now - streams.unread_since > self._limit_s:
                cut.reschedule(asyncio.get_running_loop().time())
