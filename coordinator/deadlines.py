"""Which requests' deadlines have passed."""

import heapq
import itertools
from collections.abc import Callable

from coordinator.request import Request

_MIN_STALE = 64


class Deadlines:
    """Requests by deadline. Owned by the event loop.

    A request that ends is not taken out: its entry is dropped when its deadline passes, or when
    such entries outnumber the others.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._numbers = itertools.count()  # so that requests are never compared

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, request: Request) -> None:
        """A request was taken in."""
        if request.deadline:
            heapq.heappush(self._heap, (request.deadline, next(self._numbers), request))

    def end_passed(self, now: float, num_in_flight: int, end: Callable[[Request], None]) -> bool:
        """Calls `end` for each request whose deadline is before `now`; True if there was one.

        `num_in_flight` bounds how many entries can matter.
        """
        if len(self._heap) > 2 * num_in_flight + _MIN_STALE:
            self._heap = [entry for entry in self._heap if not entry[2].is_finished]
            heapq.heapify(self._heap)
        has_ended = False
        while self._heap and self._heap[0][0] < now:
            request = heapq.heappop(self._heap)[2]
            if not request.is_finished:
                end(request)
                has_ended = True
        return has_ended
