"""Step commands on a simulated device: the real gate, then time and tokens without a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from protos.lockstep.v1 import worker_pb2
from worker.command_gate import CommandGate
from worker.rank_contract import StepTime
from worker.simulated.slots import SimulatedSlots
from worker.simulated.timing import SimulatedDevice, StepCost
from worker.tables import Chunk, TableLimits


def time_tokens(token_ids: bytes, ended: float, vocab_size: int) -> bytes:
    """Packed int32 with every token replaced by when it was made, so that its age can be told.

    Milliseconds of `ended` modulo `vocab_size`; -1 of inert rows stays.
    """
    tokens = np.frombuffer(token_ids, "<i4")
    return np.where(tokens < 0, tokens, int(ended * 1e3) % vocab_size).astype("<i4").tobytes()


@dataclass(frozen=True)
class SimulatedStep:
    """A step that has ended already."""

    command_id: int
    step: int
    arrived: float
    time: StepTime
    outcome: worker_pb2.StepResult

    def wait(self) -> StepTime:
        """Its time; nothing is left to wait for."""
        return self.time

    def result(self) -> worker_pb2.StepResult:
        """Numbers and entries."""
        self.outcome.command_id, self.outcome.step = self.command_id, self.step
        return self.outcome


class SimulatedExecutor:
    """One epoch's command stream. `slots` is None on ranks above 0, which report no tokens."""

    num_all_reduces = 0
    comm_seconds: float | None = None

    def __init__(
        self,
        epoch: int,
        limits: TableLimits,
        slots: SimulatedSlots | None,
        cost: StepCost,
        device: SimulatedDevice,
        tells_time: bool = False,
    ) -> None:
        self._gate = CommandGate(epoch, limits)
        self._slots = slots
        self._cost = cost
        self._device = device
        self._vocab_size = limits.vocab_size
        self._tells_time = tells_time

    def execute(self, command: worker_pb2.StepCommand, arrived: float) -> Iterator[SimulatedStep]:
        """Checks and applies a command, then runs its steps, yielding each when it has ended."""
        applied = self._gate.accept(command)
        if self._slots is not None:
            self._slots.write(applied)
        for offset in range(command.step_count):
            chunks = applied.chunks if offset == 0 else []
            yield self._run(command.command_id, command.first_step + offset, arrived, chunks)

    def _run(
        self, command_id: int, step: int, arrived: float, chunks: list[Chunk]
    ) -> SimulatedStep:
        tables = self._gate.tables
        rows = tables.row_slots[: tables.num_rows]
        num_prefill = sum(len(chunk.token_ids) for chunk in chunks)
        seconds = self._cost.seconds(step, len(rows), num_prefill)
        # The host's work falls into the step's own time.
        outcome = self._slots.step(rows, chunks) if self._slots else worker_pb2.StepResult()
        ended = self._device.run(arrived, seconds)
        if self._tells_time:
            outcome.token_ids = time_tokens(outcome.token_ids, ended, self._vocab_size)
        return SimulatedStep(command_id, step, arrived, StepTime(seconds, ended), outcome)
