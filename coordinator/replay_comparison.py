"""Recorded results beside those of a replay: the same tokens? as fast?"""

import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from coordinator.replay_tables import StepShape
from protos.lockstep.v1 import worker_pb2

_NUM_SLOWEST = 10


@dataclass(frozen=True)
class Difference:
    """An entry of a result that is not as recorded. Numbers are those of the log.

    A step of 0 is of before the log: the token that was to follow from a rebuilt slot.
    """

    command_id: int
    step: int
    entry: str
    slot: int
    recorded: int
    replayed: int

    def __str__(self) -> str:
        if not self.step:
            return (
                f"slot {self.slot}, rebuilt from the snapshot: recorded token {self.recorded}, "
                f"replayed {self.replayed}"
            )
        return (
            f"command {self.command_id}, step {self.step}, {self.entry} (slot {self.slot}): "
            f"recorded token {self.recorded}, replayed {self.replayed}"
        )


class StepTime(NamedTuple):
    """A step's time on the device of rank 0, microseconds, recorded and replayed."""

    slower: int  # of the two; first, so that it orders
    step: int
    command_id: int
    num_rows: int
    num_chunks: int
    num_prefill_tokens: int
    recorded: int
    replayed: int


class Comparison:
    """Pairs results by the log's step numbers, whichever of the two comes first."""

    def __init__(self) -> None:
        self.num_compared = 0
        self.num_different = 0
        self.first: Difference | None = None
        self._shapes: dict[int, StepShape] = {}
        self._recorded: dict[int, worker_pb2.StepResult] = {}
        self._replayed: dict[int, worker_pb2.StepResult] = {}
        self._micros: list[tuple[int, int]] = []
        self._slowest: list[StepTime] = []

    @property
    def num_replayed(self) -> int:
        """Steps of the log that the ranks have reported again."""
        return self.num_compared + len(self._replayed)

    @property
    def slowest(self) -> list[StepTime]:
        """Of the compared steps, slowest first; by the slower of the two times."""
        return sorted(self._slowest, reverse=True)

    def granted(self, step: int, shape: StepShape) -> None:
        """A step of the log is sent."""
        self._shapes[step] = shape

    def recorded(self, result: worker_pb2.StepResult) -> None:
        """What the log has of a step."""
        if (replayed := self._replayed.pop(result.step, None)) is not None:
            self._compare(result, replayed, result.step)
        else:
            self._recorded[result.step] = result

    def replayed(self, step: int, result: worker_pb2.StepResult) -> None:
        """What a rank reports now of the log's `step`."""
        if (recorded := self._recorded.pop(step, None)) is not None:
            self._compare(recorded, result, step)
        else:
            self._replayed[step] = result

    def restored(self, slot: int, recorded: int, replayed: int) -> None:
        """The token that followed when a slot was rebuilt."""
        if recorded != replayed:
            self._differ(Difference(0, 0, "", slot, recorded, replayed))

    def micros(self) -> npt.NDArray[np.int64]:
        """[num_compared, 2]: recorded and replayed microseconds of each step."""
        return np.array(self._micros, dtype=np.int64).reshape(-1, 2)

    def _compare(
        self, recorded: worker_pb2.StepResult, replayed: worker_pb2.StepResult, step: int
    ) -> None:
        shape = self._shapes.pop(step)
        self.num_compared += 1
        times = (recorded.step_micros, replayed.step_micros)
        self._micros.append(times)
        heapq.heappush(
            self._slowest,
            StepTime(
                max(times),
                step,
                shape.command_id,
                len(shape.rows),
                shape.num_chunks,
                shape.num_prefill_tokens,
                *times,
            ),
        )
        if len(self._slowest) > _NUM_SLOWEST:
            heapq.heappop(self._slowest)
        if recorded.token_ids != replayed.token_ids:
            self._compare_tokens(recorded, replayed, step, shape)

    def _compare_tokens(
        self,
        recorded: worker_pb2.StepResult,
        replayed: worker_pb2.StepResult,
        step: int,
        shape: StepShape,
    ) -> None:
        was = np.frombuffer(recorded.token_ids, dtype="<i4")
        now = np.frombuffer(replayed.token_ids, dtype="<i4")
        num_common = min(len(was), len(now))
        for index in np.flatnonzero(was[:num_common] != now[:num_common]).tolist():
            entry, slot = shape.entry(index)
            self._differ(
                Difference(shape.command_id, step, entry, slot, int(was[index]), int(now[index]))
            )
        if len(was) != len(now):
            sizes = f"all {len(was)} entries, {len(now)} replayed"
            self._differ(Difference(shape.command_id, step, sizes, 0, len(was), len(now)))

    def _differ(self, difference: Difference) -> None:
        self.num_different += 1
        if self.first is None:
            self.first = difference
