"""The host mirror of the batch: what the commands so far have said.

It answers three questions before anything is launched: is this command the next one, does it make
sense, and do the coordinator's tables and ours agree? See docs/protocol.md.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from protos.lockstep.v1 import worker_pb2
from worker.errors import CommandRefused
from worker.sampling_params import SlotParams
from worker.slot_opening import (
    Int32Array,
    UInt8Array,
    allowed_bits,
    cached_token_ids,
    check_lengths,
    slot_params,
    unpack_int32,
)

DUMMY_SLOT = 0
# A command with more steps is taken for a broken one: nobody could abort what it grants.
MAX_STEP_COUNT = 64


@dataclass(frozen=True)
class TableLimits:
    """Sizes that bound every number in a command."""

    max_num_seqs: int
    max_batch_tokens: int
    max_blocks_per_seq: int
    max_model_len: int
    block_size: int
    num_blocks: int
    vocab_size: int


@dataclass
class Sequence:
    """An open slot. Positions below `cached_len` were in its first blocks when it was opened."""

    slot: int
    prompt_len: int
    prefill_len: int
    limit: int
    block_ids: list[int]
    params: SlotParams
    cached_len: int = 0
    num_prefilled: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prefilled = self.cached_len

    @property
    def is_decoding(self) -> bool:
        return self.num_prefilled == self.prefill_len


@dataclass(frozen=True)
class Chunk:
    """A piece of a prompt, to run or cached; `token_ids` int32 [length].

    `targets` int32 [n] are the prompt's ids behind its first n positions, of which the
    log-probabilities are wanted.
    """

    sequence: Sequence
    start: int
    token_ids: Int32Array
    targets: Int32Array | None = None

    @property
    def is_final(self) -> bool:
        return self.start + len(self.token_ids) == self.sequence.prefill_len


@dataclass
class AppliedDelta:
    """What a command changed, for the device: each list is to be written there."""

    opened: list[Sequence] = field(default_factory=list)
    counted: list[Chunk] = field(default_factory=list)  # cached tokens that penalties count
    closed_slots: list[int] = field(default_factory=list)
    blocks: list[tuple[int, int, int]] = field(default_factory=list)  # slot, index, block id
    limits: list[tuple[int, int]] = field(default_factory=list)  # slot, limit
    rows: list[tuple[int, int]] = field(default_factory=list)  # row, slot
    chunks: list[Chunk] = field(default_factory=list)
    masks: list[tuple[int, UInt8Array]] = field(default_factory=list)  # slot, bit per id


class BatchTables:
    """Slots, blocks, limits and rows of one epoch. Used by the device thread alone."""

    def __init__(self, limits: TableLimits) -> None:
        self.limits = limits
        self.sequences: dict[int, Sequence] = {}
        self.row_slots: Int32Array = np.zeros(limits.max_num_seqs, np.int32)
        self.num_rows = 0
        self._row_of_slot: dict[int, int] = {}

    def apply(self, delta: worker_pb2.TableDelta) -> AppliedDelta:
        """Applies a delta in the order of its fields and returns the changes.

        Raises CommandRefused at the first thing that is out of range or makes no sense; the tables
        are then half changed and their epoch is over.
        """
        applied = AppliedDelta()
        for slot in unpack_int32(delta.closed_slots, 1, "closed_slots")[:, 0]:
            self._close(int(slot), applied)
        for opening in delta.opened_slots:
            self._open(opening, applied)
        for slot, index, block_id in unpack_int32(delta.block_appends, 3, "block_appends"):
            self._append_block(int(slot), int(index), int(block_id), applied)
        for slot, limit in unpack_int32(delta.limits, 2, "limits"):
            self._raise_limit(int(slot), int(limit), applied)
        self._change_rows(delta, applied)
        self._take_chunks(delta, applied)
        for mask in delta.masks:
            self._take_mask(mask, applied)
        return applied

    def digest(self) -> bytes:
        """First 8 bytes of BLAKE2b-256 over the tables, laid out as docs/protocol.md says."""
        numbers = [self.num_rows, *self.row_slots[: self.num_rows].tolist()]
        for slot in sorted(self.sequences):
            seq = self.sequences[slot]
            numbers += [slot, seq.prompt_len, seq.prefill_len, seq.limit, len(seq.block_ids)]
            numbers += seq.block_ids
        packed = np.asarray(numbers, "<i4").tobytes()
        return hashlib.blake2b(packed, digest_size=32).digest()[:8]

    def _close(self, slot: int, applied: AppliedDelta) -> None:
        self._sequence(slot, "closed_slots")
        del self.sequences[slot]
        applied.closed_slots.append(slot)

    def _open(self, opening: worker_pb2.SlotOpen, applied: AppliedDelta) -> None:
        slot = opening.slot
        if not 1 <= slot <= self.limits.max_num_seqs:
            raise CommandRefused(f"opened slot {slot} is not in 1..{self.limits.max_num_seqs}")
        if slot in self.sequences:
            raise CommandRefused(f"opened slot {slot} is open")
        block_ids = unpack_int32(opening.block_ids, 1, "block_ids")[:, 0].tolist()
        check_lengths(opening, len(block_ids), self.limits.block_size)
        params = slot_params(opening)
        seq = Sequence(
            slot, opening.prompt_len, opening.prefill_len, 0, [], params, opening.cached_len
        )
        self.sequences[slot] = seq
        applied.opened.append(seq)
        counted = cached_token_ids(opening, params, self.limits.vocab_size)
        if len(counted):
            applied.counted.append(Chunk(seq, 0, counted))
        for index, block_id in enumerate(block_ids):
            self._append_block(slot, index, block_id, applied)
        self._raise_limit(slot, opening.limit, applied)

    def _append_block(self, slot: int, index: int, block_id: int, applied: AppliedDelta) -> None:
        seq = self._sequence(slot, "block_appends")
        if index != len(seq.block_ids) or index >= self.limits.max_blocks_per_seq:
            raise CommandRefused(
                f"slot {slot} has {len(seq.block_ids)} of at most"
                f" {self.limits.max_blocks_per_seq} blocks; index {index} is not the next"
            )
        if not 1 <= block_id < self.limits.num_blocks:
            raise CommandRefused(f"block {block_id} is not in 1..{self.limits.num_blocks - 1}")
        seq.block_ids.append(block_id)
        applied.blocks.append((slot, index, block_id))

    def _raise_limit(self, slot: int, limit: int, applied: AppliedDelta) -> None:
        seq = self._sequence(slot, "limits")
        covered = len(seq.block_ids) * self.limits.block_size
        if not seq.limit <= limit <= covered:
            raise CommandRefused(
                f"slot {slot}: limit {limit} is not between the old {seq.limit} and"
                f" {covered}, the positions its blocks cover"
            )
        if limit >= self.limits.max_model_len:
            raise CommandRefused(
                f"slot {slot}: limit {limit} is not below max_model_len {self.limits.max_model_len}"
            )
        seq.limit = limit
        applied.limits.append((slot, limit))

    def _change_rows(self, delta: worker_pb2.TableDelta, applied: AppliedDelta) -> None:
        changes = unpack_int32(delta.row_changes, 2, "row_changes").tolist()
        for row, _ in changes:
            if not 0 <= row < self.limits.max_num_seqs:
                raise CommandRefused(f"row {row} is not in 0..{self.limits.max_num_seqs - 1}")
            self._row_of_slot.pop(int(self.row_slots[row]), None)
        for row, slot in changes:
            self.row_slots[row] = slot
            applied.rows.append((row, slot))
            if slot == DUMMY_SLOT:
                continue
            if slot in self._row_of_slot:
                raise CommandRefused(f"rows {self._row_of_slot[slot]} and {row} name slot {slot}")
            self._row_of_slot[slot] = row
        self.num_rows = delta.row_count
        if not len(self._row_of_slot) == self.num_rows == np.count_nonzero(self.row_slots) or (
            self.num_rows and not self.row_slots[: self.num_rows].all()
        ):
            raise CommandRefused(
                f"row_count is {self.num_rows}, the rows in use are"
                f" {sorted(self._row_of_slot.values())}"
            )
        for slot in [*applied.closed_slots, *(slot for _, slot in changes if slot)]:
            if slot in self._row_of_slot and not self._sequence(slot, "rows").is_decoding:
                raise CommandRefused(f"a row names slot {slot}, which is still in prefill")

    def _take_chunks(self, delta: worker_pb2.TableDelta, applied: AppliedDelta) -> None:
        token_ids = unpack_int32(delta.chunk_token_ids, 1, "chunk_token_ids")[:, 0]
        if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < self.limits.vocab_size:
            raise CommandRefused(f"a chunk token id is not in 0..{self.limits.vocab_size - 1}")
        taken = 0
        behind = dict(unpack_int32(delta.prompt_targets, 2, "prompt_targets").tolist())
        for slot, start, length in unpack_int32(delta.chunks, 3, "chunks").tolist():
            seq = self._sequence(slot, "chunks")
            end = start + length
            if start != seq.num_prefilled or length < 1 or end > min(seq.prefill_len, seq.limit):
                raise CommandRefused(
                    f"slot {slot}: chunk {start}+{length} does not follow {seq.num_prefilled}"
                    f" within prefill_len {seq.prefill_len} and limit {seq.limit}"
                )
            seq.num_prefilled = end
            ids = token_ids[taken : taken + length]
            targets = None if slot not in behind else self._targets(seq, end, ids, behind.pop(slot))
            applied.chunks.append(Chunk(seq, start, ids, targets))
            taken += length
        if behind:
            raise CommandRefused(f"prompt_targets name slots {sorted(behind)} without a chunk")
        if taken != token_ids.size:
            raise CommandRefused(f"chunks name {taken} token ids, {token_ids.size} came")
        if self.num_rows + taken > self.limits.max_batch_tokens:
            raise CommandRefused(
                f"{self.num_rows} rows and {taken} chunk tokens are above max_batch_tokens"
                f" {self.limits.max_batch_tokens}"
            )

    def _targets(self, seq: Sequence, end: int, ids: Int32Array, behind: int) -> Int32Array:
        """The prompt's ids behind the positions of a chunk that ends before `end`."""
        is_inside = end < seq.prompt_len
        if not (0 <= behind < self.limits.vocab_size if is_inside else behind == -1):
            raise CommandRefused(
                f"slot {seq.slot}: {behind} cannot stand behind its chunk, which ends at {end} in a"
                f" prompt of {seq.prompt_len}"
            )
        num_wanted = max(min(end, seq.prompt_len - 1) - (end - len(ids)), 0)
        return np.append(ids[1:], np.int32(behind)).astype(np.int32)[:num_wanted]

    def _take_mask(self, mask: worker_pb2.SlotMask, applied: AppliedDelta) -> None:
        seq = self._sequence(mask.slot, "masks")
        if not seq.params.is_constrained:
            raise CommandRefused(f"slot {mask.slot} is not constrained, but gets a mask")
        applied.masks.append((mask.slot, allowed_bits(mask, self.limits.vocab_size)))

    def _sequence(self, slot: int, where: str) -> Sequence:
        seq = self.sequences.get(slot)
        if seq is None:
            raise CommandRefused(f"{where} names slot {slot}, which is not open")
        return seq


class CommandFence:
    """Lets only the next command of this epoch with the right digest pass."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._command_id = 0
        self._next_step = 1
        self._digest = bytes(8)

    def check(self, command: worker_pb2.StepCommand) -> None:
        """Raises CommandRefused naming both views; otherwise this command has passed."""
        if command.epoch != self._epoch:
            raise CommandRefused(f"command of epoch {command.epoch}, this is {self._epoch}")
        if command.command_id != self._command_id + 1:
            raise CommandRefused(
                f"command {command.command_id} came after {self._command_id}, a gap or repeat"
            )
        if command.first_step != self._next_step or not 0 <= command.step_count <= MAX_STEP_COUNT:
            raise CommandRefused(
                f"command {command.command_id} grants {command.step_count} steps from"
                f" {command.first_step}; the next here is {self._next_step}, and a command"
                f" grants 0 to {MAX_STEP_COUNT}"
            )
        digest = hashlib.blake2b(self._digest + command.delta, digest_size=32).digest()[:8]
        if command.digest != digest:
            raise CommandRefused(
                f"command {command.command_id}: coordinator's digest {command.digest.hex()},"
                f" ours {digest.hex()}"
            )
        self._command_id += 1
        self._next_step += command.step_count
        self._digest = digest
