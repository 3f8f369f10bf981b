"""Requests in the engine whose frontend holds nothing for them: there should be none."""

from collections import Counter


class ClientCount:
    """Compares what the engine has of each frontend with what that frontend says it holds.

    A frontend holds a request from its Submit to its Release or Ended, and its messages come in
    order: when its report is read, every Submit and Release before it has been applied, and an
    Ended that it has not read yet only makes its number larger. So more requests here than it
    reports are requests without a client, whatever is in flight. Owned by the event loop.
    """

    def __init__(self) -> None:
        self._num_in_flight = Counter[int]()
        self._num_excess: dict[int, int] = {}

    def began(self, frontend: int) -> None:
        """A request of a frontend was taken in."""
        self._num_in_flight[frontend] += 1

    def ended(self, frontend: int) -> None:
        """A request of a frontend has ended."""
        self._num_in_flight[frontend] -= 1

    def reported(self, frontend: int, num_held: int) -> int:
        """A frontend holds that many; returns the requests without a client, of all frontends."""
        self._num_excess[frontend] = max(self._num_in_flight[frontend] - num_held, 0)
        return sum(self._num_excess.values())
