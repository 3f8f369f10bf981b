"""Turns step commands into steps: gate, device tables, forward pass, in this order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from protos.lockstep.v1 import worker_pb2
from worker.command_gate import CommandGate
from worker.model_runner import ModelRunner, StepTensors, empty_step
from worker.rank_contract import StepTime
from worker.result_message import Entries, step_result
from worker.sampling_params import SamplePlan, plan_sample
from worker.step_graphs import StepGraphs
from worker.tables import AppliedDelta, Chunk, TableLimits


@dataclass(frozen=True)
class EnqueuedStep:
    """A step that has been enqueued; its host tensors are valid once `done` has happened.

    `entries` picks the real entries of every tensor, in the order of the result; the others are
    padding. The events are None on CPU, where the step has ended when this exists and `time` says
    how it went.
    """

    command_id: int
    step: int
    arrived: float
    entries: Entries
    tensors: dict[str, Tensor]
    started: torch.cuda.Event | None
    done: torch.cuda.Event | None
    time: StepTime

    def wait(self) -> StepTime:
        """Blocks until the step has ended on the device."""
        if self.started is None or self.done is None:
            return self.time
        self.done.synchronize()
        seconds = float(self.started.elapsed_time(self.done)) / 1e3
        return StepTime(seconds, time.monotonic())

    def result(self) -> worker_pb2.StepResult:
        """The real entries, packed; after `wait`."""
        return step_result(self.command_id, self.step, self.tensors, self.entries)


class StepExecutor:
    """One epoch's command stream. Used by the device thread alone, but for its figures."""

    def __init__(
        self,
        epoch: int,
        limits: TableLimits,
        runner: ModelRunner,
        graphs: StepGraphs | None,
    ) -> None:
        self._gate = CommandGate(epoch, limits)
        self._tables = self._gate.tables
        self._runner = runner
        self._graphs = graphs
        self._row_plan = SamplePlan()
        self._on_cuda = runner.tables.device.type == "cuda"
        self._comm_s_before = runner.comm.stats.seconds

    def execute(self, command: worker_pb2.StepCommand, arrived: float) -> Iterator[EnqueuedStep]:
        """Checks a command, applies it and enqueues its steps, yielding each.

        `arrived` is CLOCK_MONOTONIC. Raises CommandRefused before anything has been launched.
        """
        applied = self._gate.accept(command)
        self._runner.tables.write(applied)
        self._set_sampling(applied)
        for offset in range(command.step_count):
            chunks = applied.chunks if offset == 0 else []
            yield self._run(command.command_id, command.first_step + offset, arrived, chunks)

    @property
    def num_all_reduces(self) -> int:
        """All-reduces that this rank has run in its group. Any thread; perhaps slightly old."""
        replayed = self._graphs.num_replayed_all_reduces if self._graphs else 0
        return self._runner.comm.stats.all_reduce.calls + replayed

    @property
    def comm_seconds(self) -> float | None:
        """Time in collectives in this epoch; None where the communicator does not measure it."""
        seconds = self._runner.comm.stats.seconds
        if seconds is None or self._comm_s_before is None:
            return None
        return seconds - self._comm_s_before

    def _set_sampling(self, applied: AppliedDelta) -> None:
        opened = applied.opened
        self._runner.sampling.set_rows([seq.slot for seq in opened], [seq.params for seq in opened])
        self._runner.sampling.choices.set_masks(applied.masks)
        self._runner.mark_counts(applied.counted)
        if applied.rows:
            rows = self._tables.row_slots[: self._tables.num_rows].tolist()
            self._row_plan = plan_sample(self._tables.sequences[slot].params for slot in rows)

    def _run(self, command_id: int, step: int, arrived: float, chunks: list[Chunk]) -> EnqueuedStep:
        num_rows = self._tables.num_rows
        begun = time.perf_counter()
        started, done = self._events()
        if started is not None:
            started.record()
        result, entries = self._launch(num_rows, chunks)
        # Copies follow on the same stream, before the next replay can overwrite their sources.
        tensors = {name: copy_to_host(value) for name, value in result.named().items()}
        if done is not None:
            done.record()
        took = StepTime(time.perf_counter() - begun, time.monotonic())
        return EnqueuedStep(command_id, step, arrived, entries, tensors, started, done, took)

    def _launch(self, num_rows: int, chunks: list[Chunk]) -> tuple[StepTensors, Entries]:
        """Enqueues a step by graph where there is one, and says which of its entries are real."""
        runner, graphs = self._runner, self._graphs
        if not chunks:
            if not num_rows:
                return empty_step(runner.tables.device), slice(0)
            if graphs is None:
                return runner.decode_step(num_rows, self._row_plan), slice(num_rows)
            return graphs.decode.step(num_rows, self._row_plan), slice(num_rows)
        plan = self._mixed_plan(chunks)
        if graphs is not None and graphs.mixed.covers(num_rows, chunks):
            return graphs.mixed.step(num_rows, chunks, plan)
        num_finals = sum(chunk.is_final for chunk in chunks)
        return runner.mixed_step(num_rows, chunks, plan), slice(num_rows + num_finals)

    def _mixed_plan(self, chunks: list[Chunk]) -> SamplePlan:
        slots = self._tables.row_slots[: self._tables.num_rows].tolist()
        slots += [chunk.sequence.slot for chunk in chunks if chunk.is_final]
        return plan_sample(self._tables.sequences[slot].params for slot in slots)

    def _events(self) -> tuple[torch.cuda.Event | None, torch.cuda.Event | None]:
        if not self._on_cuda:
            return None, None
        return _timed_event(), _timed_event()


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def copy_to_host(tensor: Tensor) -> Tensor:
    """A host copy, valid once the stream has come this far; never the device tensor itself."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    return tensor.to("cpu", non_blocking=True)
