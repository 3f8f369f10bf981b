"""How long commands take from the coordinator to the ranks of its own host."""

from collections.abc import Callable, Sequence

_NUM_REMEMBERED = 1024  # commands; ranks above 0 report about every 100 ms


class BroadcastTime:
    """Compares when a command was sent with when it came to a rank, where one clock tells both.

    `boot_ids` are the ranks' own words for their host, by rank; `own_boot_id` is the coordinator's.
    `observe` gets a rank and seconds, once a command at most. Owned by the event loop.
    """

    def __init__(
        self, boot_ids: Sequence[str], own_boot_id: str, observe: Callable[[int, float], None]
    ) -> None:
        self._is_near = [boot_id == own_boot_id for boot_id in boot_ids]
        self._observe = observe
        self._sent = [(0, 0.0)] * _NUM_REMEMBERED  # (command, seconds) at command % length
        self._last_seen = [0] * len(boot_ids)

    def sent(self, command_id: int, now: float) -> None:
        """A command goes to all ranks; `now` is CLOCK_MONOTONIC in seconds."""
        self._sent[command_id % _NUM_REMEMBERED] = command_id, now

    def arrived(self, rank: int, command_id: int, arrival_micros: int) -> None:
        """A rank reports when a command came to it; 0 if it did not note that."""
        if not arrival_micros or not self._is_near[rank] or command_id == self._last_seen[rank]:
            return
        self._last_seen[rank] = command_id
        sent_id, sent_at = self._sent[command_id % _NUM_REMEMBERED]
        if sent_id == command_id:
            self._observe(rank, max(arrival_micros / 1e6 - sent_at, 0.0))
