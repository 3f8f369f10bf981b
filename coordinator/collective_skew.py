"""How much later than the first rank the others come to their collectives."""

from __future__ import annotations


class CollectiveSkew:
    """Compares what ranks waited, which needs no common clock. Owned by the event loop.

    All ranks issue the same collectives, and one that comes late finds what it needs there: the
    rank that waits least is the one that the others wait for.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._totals: dict[int, tuple[int, int]] = {}
        self._waits: dict[int, float] = {}
        self.seconds: dict[int, float] = {}
        """By rank: mean of the collectives between its last two readings, about a second."""

    def reported(self, rank: int, count: int, micros: int) -> None:
        """Totals of a rank: collectives that have ended in its group, and what they took."""
        before = self._totals.get(rank)
        if before is not None and before[0] == count:
            return
        self._totals[rank] = count, micros
        if before is None or count < before[0]:  # totals of the group before
            self._waits.pop(rank, None)
            return
        self._waits[rank] = (micros - before[1]) / (count - before[0]) / 1e6
        if len(self._waits) == self._world_size > 1:
            longest = max(self._waits.values())
            self.seconds.update({each: longest - wait for each, wait in self._waits.items()})


def slowest_rank(skews: dict[int, float]) -> int | None:
    """The rank that the others wait for most; None while nothing is known."""
    return max(skews, key=lambda rank: (skews[rank], -rank), default=None)
