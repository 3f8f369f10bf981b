"""What a replay must know of the tables: who has which entry in a step's result."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coordinator.step_command import pack_int32, unpack_int32
from protos.lockstep.v1 import step_log_pb2, worker_pb2


@dataclass(frozen=True)
class StepShape:
    """A granted step. `rows` are the slots by row, `finals` those of final chunks in order."""

    command_id: int
    rows: Sequence[int]
    finals: Sequence[int]
    num_chunks: int
    num_prefill_tokens: int

    def entry(self, index: int) -> tuple[str, int]:
        """(which row or chunk, slot) of an entry of the step's result."""
        if index < len(self.rows):
            return f"row {index}", self.rows[index]
        return f"final chunk {index - len(self.rows)}", self.finals[index - len(self.rows)]


class ReplayTables:
    """Rows and prefill lengths as the commands so far have left them."""

    def __init__(self, snapshot: step_log_pb2.StepLogSnapshot) -> None:
        self._rows = tuple(unpack_int32(snapshot.row_slots))
        self._prefill_lens = {slot.open.slot: slot.open.prefill_len for slot in snapshot.slots}

    def apply(self, command: worker_pb2.StepCommand) -> list[StepShape]:
        """The steps that a command grants."""
        delta = worker_pb2.TableDelta.FromString(command.delta)
        for slot in unpack_int32(delta.closed_slots):
            del self._prefill_lens[slot]
        for opening in delta.opened_slots:
            self._prefill_lens[opening.slot] = opening.prefill_len
        self._change_rows(delta)
        chunks = _pairs(delta.chunks, 3).tolist()
        finals = tuple(
            slot for slot, start, length in chunks if start + length == self._prefill_lens[slot]
        )
        num_tokens = sum(length for _, _, length in chunks)
        first = StepShape(command.command_id, self._rows, finals, len(chunks), num_tokens)
        others = StepShape(command.command_id, self._rows, (), 0, 0)
        return [first, *[others] * (command.step_count - 1)][: command.step_count]

    def no_change(self) -> bytes:
        """The serialised delta of a command that changes nothing."""
        return worker_pb2.TableDelta(row_count=len(self._rows)).SerializeToString()

    def _change_rows(self, delta: worker_pb2.TableDelta) -> None:
        changes = _pairs(delta.row_changes, 2).tolist()
        if changes or delta.row_count != len(self._rows):
            rows = dict(enumerate(self._rows)) | dict(changes)
            self._rows = tuple(rows[row] for row in range(delta.row_count))


@dataclass(frozen=True)
class RestoreCommand:
    """A command that rebuilds a part of a snapshot. `expected` are (slot, token) that the final
    chunks must choose, in order: the last token each slot was known to have."""

    delta: bytes
    num_steps: int
    expected: Sequence[tuple[int, int]]


def restore_commands(
    snapshot: step_log_pb2.StepLogSnapshot, max_batch_tokens: int
) -> Iterator[RestoreCommand]:
    """Commands after which ranks with empty tables stand where the snapshot was taken.

    A slot that decodes is prefilled with all tokens but the last, which it then samples itself.
    """
    if not snapshot.slots:
        return
    delta = worker_pb2.TableDelta(
        opened_slots=[_reopened(slot) for slot in snapshot.slots],
        masks=[slot.mask for slot in snapshot.slots if slot.HasField("mask")],
    )
    expected: list[tuple[int, int]] = []
    room = max_batch_tokens
    for slot in snapshot.slots:
        tokens = _to_prefill(slot)
        start = 0
        while start < len(tokens):
            if not room:
                yield RestoreCommand(delta.SerializeToString(), 1, expected)
                delta, expected, room = worker_pb2.TableDelta(), [], max_batch_tokens
            length = min(room, len(tokens) - start)
            delta.chunks += pack_int32([(slot.open.slot, start, length)])
            delta.chunk_token_ids += tokens[start : start + length].tobytes()
            start, room = start + length, room - length
        if _is_prefilled(slot):
            expected.append((slot.open.slot, unpack_int32(slot.token_ids)[-1]))
    yield RestoreCommand(delta.SerializeToString(), 1, expected)
    rows = unpack_int32(snapshot.row_slots)
    set_rows = worker_pb2.TableDelta(
        row_changes=pack_int32(list(enumerate(rows))), row_count=len(rows)
    )
    yield RestoreCommand(set_rows.SerializeToString(), 0, ())


def _reopened(slot: step_log_pb2.StepLogSlot) -> worker_pb2.SlotOpen:
    opening = worker_pb2.SlotOpen()
    opening.CopyFrom(slot.open)
    if _is_prefilled(slot):
        opening.prefill_len = len(_to_prefill(slot))
    return opening


def _is_prefilled(slot: step_log_pb2.StepLogSlot) -> bool:
    return slot.prefilled_count == slot.open.prefill_len


def _to_prefill(slot: step_log_pb2.StepLogSlot) -> npt.NDArray[np.int32]:
    tokens = np.frombuffer(slot.token_ids, dtype="<i4")
    return tokens[:-1] if _is_prefilled(slot) else tokens


def _pairs(packed: bytes, width: int) -> npt.NDArray[np.int32]:
    return np.frombuffer(packed, dtype="<i4").reshape(-1, width)
