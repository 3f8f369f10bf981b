"""Samples of one call that wait until they can share the blocks of its first sample's prompt."""

from collections.abc import Iterable

from coordinator.request import Request


class SampleGroups:
    """Holds samples back from the queue. Owned by the event loop.

    A sample waits while its leader, sample 0, is in flight and its prompt is not yet sent as a
    whole; who holds them tells when that may have changed.
    """

    def __init__(self) -> None:
        self._held: dict[int, list[Request]] = {}  # by order of the leader

    def __len__(self) -> int:
        return sum(len(samples) for samples in self._held.values())

    def try_hold(self, request: Request) -> bool:
        """Holds a new request back if it has to wait for its leader."""
        leader = request.leader
        if leader is None or not _is_awaited(leader):
            return False
        self._held.setdefault(leader.order, []).append(request)
        return True

    def take_ready(self, leaders: Iterable[Request]) -> list[Request]:
        """The samples that need not wait any longer, in the order of their arrival."""
        if not self._held:
            return []
        ready: list[Request] = []
        for leader in leaders:
            if not _is_awaited(leader):
                ready += self._held.pop(leader.order, [])
        return ready

    def remove(self, request: Request) -> bool:
        """Removes a request that has ended; False if it was not held."""
        for leader, held in self._held.items():
            if request in held:
                held.remove(request)
                if not held:
                    del self._held[leader]
                return True
        return False


def _is_awaited(leader: Request) -> bool:
    return not leader.is_finished and leader.num_prefilled < leader.prompt_len
