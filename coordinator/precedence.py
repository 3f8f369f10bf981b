"""Who goes on when there is not room for all: the numbers that order requests."""

_S_PER_PRIORITY = 10.0  # one unit of priority counts like an arrival that much later
_NS_PER_S = 1e9


def virtual_arrival(arrival_time: float, priority: int) -> int:
    """`arrival_time`, CLOCK_MONOTONIC in seconds, moved by the priority; nanoseconds."""
    return int((arrival_time + _S_PER_PRIORITY * priority) * _NS_PER_S)


class Precedence:
    """Makes virtual arrivals unique: the `order` of requests, smaller goes first.

    The order is that of one tenant's requests in the queue, and it says who loses its place when KV
    blocks run out: the largest number first.

    Nobody starves. Priorities are bounded, so only finitely many requests, those that arrive within
    `10 s * (priority range)` of a request, can ever have a smaller number than it. A request that
    holds a slot is preempted only while one with a smaller number holds one too, because room is
    taken from the largest number on, and the smallest is never preempted, computes in every step,
    and ends after at most max_tokens tokens. So between any preemption and the next end of a
    request there are finitely many steps, each end leaves one request less that can be in the way
    of another, and whoever lost its place is first in the queue when there is room.

    Owned by the event loop.
    """

    def __init__(self) -> None:
        self._taken: set[int] = set()

    def take(self, order: int) -> int:
        """The first free number from `order` on."""
        while order in self._taken:  # samples of one call arrive at the same time
            order += 1
        self._taken.add(order)
        return order

    def give_back(self, order: int) -> None:
        """The request has ended."""
        self._taken.remove(order)
