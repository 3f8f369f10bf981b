"""How much later than rank 0 the other ranks get the same command."""

from collections.abc import Sequence

_NUM_REMEMBERED = 1024  # commands; ranks above 0 report about every 100 ms


class ArrivalSkew:
    """Compares arrival times of ranks that share rank 0's host, and so its monotonic clock.

    `boot_ids` are the ranks' own words for their host, by rank. Owned by the event loop.
    """

    def __init__(self, boot_ids: Sequence[str]) -> None:
        self.seconds: dict[int, float] = {}
        """By rank: how much later than to rank 0 the last compared command came; < 0: sooner."""
        self._is_near = [bool(boot_id) and boot_id == boot_ids[0] for boot_id in boot_ids]
        self._rank_0 = [(0, 0)] * _NUM_REMEMBERED  # (command, microseconds) at command % length
        self._early: dict[
            int, tuple[int, int]
        ] = {}  # by rank: of a command rank 0 is not done with

    def arrived(self, rank: int, command_id: int, arrival_micros: int) -> None:
        """A rank reports when a command came to it; 0 if it did not note that."""
        if not arrival_micros or not self._is_near[rank]:
            return
        if rank:
            known_id, known_micros = self._rank_0[command_id % _NUM_REMEMBERED]
            if known_id == command_id:
                self.seconds[rank] = (arrival_micros - known_micros) / 1e6
            else:
                self._early[rank] = command_id, arrival_micros
            return
        self._rank_0[command_id % _NUM_REMEMBERED] = command_id, arrival_micros
        for other, (early_id, early_micros) in [*self._early.items()]:
            if early_id <= command_id:
                del self._early[other]
            if early_id == command_id:
                self.seconds[other] = (early_micros - arrival_micros) / 1e6
