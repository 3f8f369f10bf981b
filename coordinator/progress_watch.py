"""How far each rank is behind what it was sent, and for how long nothing has come from it."""

from collections import deque
from collections.abc import Sequence

from coordinator.errors import RankLost


class _RankProgress:
    def __init__(self) -> None:
        self.unreported: deque[tuple[int, int, float]] = deque()  # command, last step, sent at
        self.advanced_at = 0.0
        self.last_step = 0
        self.num_all_reduces = 0

    def waiting_since(self) -> float | None:
        """When the wait for the oldest unreported command began; None if nothing is owed.

        A command waits for those before it, so its clock starts when the rank last moved on.
        """
        if not self.unreported:
            return None
        return max(self.unreported[0][2], self.advanced_at)


class ProgressWatch:
    """Liveness is progress: a rank that owes reports and does not move on is lost."""

    def __init__(self, num_ranks: int, step_timeout_s: float) -> None:
        self._ranks = [_RankProgress() for _ in range(num_ranks)]
        self._step_timeout_s = step_timeout_s

    @property
    def num_all_reduces(self) -> Sequence[int]:
        """All-reduces that each rank has reported."""
        return [rank.num_all_reduces for rank in self._ranks]

    @property
    def is_settled(self) -> bool:
        """Every rank has reported all that it was sent."""
        return not any(rank.unreported for rank in self._ranks)

    def sent(self, command_id: int, last_step: int, now: float) -> None:
        """A command went out to all ranks; `last_step` of a heartbeat is the step before it."""
        for rank in self._ranks:
            rank.unreported.append((command_id, last_step, now))

    def reported(
        self, rank: int, command_id: int, step: int, num_all_reduces: int, now: float
    ) -> None:
        """A rank has done all up to `step` of `command_id`."""
        progress = self._ranks[rank]
        progress.advanced_at = now
        progress.last_step = step
        progress.num_all_reduces = num_all_reduces
        unreported = progress.unreported
        while unreported and (
            unreported[0][0] < command_id
            or (unreported[0][0] == command_id and unreported[0][1] <= step)
        ):
            unreported.popleft()

    def last_step(self, rank: int) -> int:
        """Last step that a rank reported."""
        return self._ranks[rank].last_step

    def longest_wait_s(self, now: float) -> float:
        """For how long the rank that is furthest behind has owed a report; 0 if none does."""
        since = [rank.waiting_since() for rank in self._ranks]
        return max((now - at for at in since if at is not None), default=0.0)

    def check(self, now: float) -> None:
        """Raises RankLost for the rank that has been silent longest, if any is over the limit."""
        waits = [
            (since, rank)
            for rank, progress in enumerate(self._ranks)
            if (since := progress.waiting_since()) is not None
        ]
        if not waits:
            return
        since, rank = min(waits)
        if now - since > self._step_timeout_s:
            progress = self._ranks[rank]
            raise RankLost(
                rank,
                progress.last_step + 1,
                f"command {progress.unreported[0][0]} is unreported for {now - since:.1f} s "
                f"(--step-timeout {self._step_timeout_s:g})",
            )
