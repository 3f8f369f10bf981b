"""Waits between attempts that end when the client closes."""

import threading
from collections.abc import Callable

from lockstep.client.statuses import failure


class Pauses:
    """Of one client. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_closed = False

    def close(self) -> None:
        """Ends all pauses, for good."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def wake(self) -> None:
        """Something that a pause depends on has changed."""
        with self._changed:
            self._changed.notify_all()

    def pause(self, seconds: float, is_cancelled: Callable[[], bool] = lambda: False) -> None:
        """Waits that long. Raises Cancelled once the client is closed or `is_cancelled`."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or is_cancelled(), seconds)
        self.check(is_cancelled)

    def check(self, is_cancelled: Callable[[], bool] = lambda: False) -> None:
        """Raises Cancelled if the client is closed or `is_cancelled`."""
        if self._is_closed:
            raise failure("CANCELLED", "the client is closed")
        if is_cancelled():
            raise failure("CANCELLED", "the call was cancelled before its next attempt")
