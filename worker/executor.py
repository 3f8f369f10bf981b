"""Turns step commands into steps: fence, tables, device, in this order."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from protos.lockstep.v1 import worker_pb2
from worker.errors import CommandRefused
from worker.model_runner import ModelRunner, StepTensors, empty_step
from worker.sampling.params import SamplePlan, SlotParams, plan_sample
from worker.step_graphs import StepGraphs
from worker.tables import AppliedDelta, BatchTables, Chunk, CommandFence, unpack_int32

# Which entries of a step's tensors are real.
Entries: TypeAlias = slice | list[int]


@dataclass(frozen=True)
class PendingStep:
    """A step that has been enqueued; its host tensors are valid once `done` has happened.

    `entries` picks the real entries of every tensor, in the order of the result; the others are
    padding. The events are None on CPU,
    where the step has ended when this exists and `seconds` is its time.
    """

    command_id: int
    step: int
    entries: Entries
    tensors: dict[str, Tensor]
    started: torch.cuda.Event | None
    done: torch.cuda.Event | None
    seconds: float

    def wait(self) -> float:
        """Blocks until the step has ended on the device; returns its time there in seconds."""
        if self.started is None or self.done is None:
            return self.seconds
        self.done.synchronize()
        return float(self.started.elapsed_time(self.done)) / 1e3


class StepExecutor:
    """One epoch's command stream. Used by the device thread alone."""

    def __init__(
        self,
        epoch: int,
        tables: BatchTables,
        runner: ModelRunner,
        graphs: StepGraphs | None,
    ) -> None:
        self._fence = CommandFence(epoch)
        self._tables = tables
        self._runner = runner
        self._graphs = graphs
        self._slot_params: dict[int, SlotParams] = {}
        self._row_plan = SamplePlan()
        self._on_cuda = runner.tables.device.type == "cuda"

    def execute(self, command: worker_pb2.StepCommand) -> list[PendingStep]:
        """Checks a command, applies it and enqueues its steps.

        Raises CommandRefused before anything of it has been launched.
        """
        applied = self._accept(command)
        self._runner.tables.write(applied)
        self._set_sampling(applied)
        steps = []
        for offset in range(command.step_count):
            chunks = applied.chunks if offset == 0 else []
            steps.append(self._run(command.command_id, command.first_step + offset, chunks))
        return steps

    @property
    def num_all_reduces(self) -> int:
        """All-reduces that this rank has run in its group. Any thread; perhaps slightly old."""
        replayed = self._graphs.num_replayed_all_reduces if self._graphs else 0
        return self._runner.comm.stats.all_reduce.calls + replayed

    def _accept(self, command: worker_pb2.StepCommand) -> AppliedDelta:
        self._fence.check(command)
        delta = worker_pb2.TableDelta.FromString(command.delta)
        if command.step_count == 0 and delta.chunks:
            raise CommandRefused(f"command {command.command_id} has chunks but grants no step")
        applied = self._tables.apply(delta)
        if command.table_digest:
            digest = self._tables.digest()
            if command.table_digest != digest:
                raise CommandRefused(
                    f"command {command.command_id}: the coordinator's tables have digest"
                    f" {command.table_digest.hex()}, ours {digest.hex()}"
                )
        return applied

    def _set_sampling(self, applied: AppliedDelta) -> None:
        for slot in applied.closed_slots:
            self._slot_params.pop(slot, None)
        for seq in applied.opened:
            self._slot_params[seq.slot] = slot_params(seq.params)
        slots = [seq.slot for seq in applied.opened]
        self._runner.sampling.set_rows(slots, [self._slot_params[slot] for slot in slots])
        if applied.rows:
            rows = self._tables.row_slots[: self._tables.num_rows].tolist()
            self._row_plan = plan_sample(self._slot_params[slot] for slot in rows)

    def _run(self, command_id: int, step: int, chunks: list[Chunk]) -> PendingStep:
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
        seconds = time.perf_counter() - begun
        return PendingStep(command_id, step, entries, tensors, started, done, seconds)

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
        return plan_sample(self._slot_params[slot] for slot in slots)

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


def slot_params(opening: worker_pb2.SlotOpen) -> SlotParams:
    """The sampler's view of a sequence; raises CommandRefused naming what is out of range."""
    try:
        return SlotParams(
            temperature=opening.temperature,
            top_k=opening.top_k,
            top_p=opening.top_p,
            min_p=opening.min_p,
            seed=opening.seed & (2**64 - 1),
            repetition_penalty=opening.repetition_penalty,
            presence_penalty=opening.presence_penalty,
            frequency_penalty=opening.frequency_penalty,
            prompt_len=opening.prompt_len,
            min_tokens=opening.min_tokens,
            stop_ids=tuple(unpack_int32(opening.stop_ids, 1, "stop_ids")[:, 0].tolist()),
            num_logprobs=None if opening.logprob_count < 0 else opening.logprob_count,
        )
    except ValueError as error:
        raise CommandRefused(f"slot {opening.slot}: {error}") from None
