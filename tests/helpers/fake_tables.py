"""A fake worker's tables: what the commands said, what the blocks hold, which tokens come next.

Written from docs/protocol.md alone, apart from the real worker's tables, so that a slip in either
shows. `tests/helpers/fake_worker.py` puts a server around it.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from protos.lockstep.v1 import worker_pb2
from tests.helpers.fake_blocks import BlockRecord

if TYPE_CHECKING:
    from tests.helpers.fake_worker import FakeSettings

FLAG_STOP = 1
FLAG_NOT_FINITE = 2


@dataclass
class _Slot:
    prompt_len: int
    prefill_len: int
    limit: int
    block_ids: list[int]
    stop_ids: tuple[int, ...]
    min_tokens: int
    num_logprobs: int
    cached_len: int
    token_ids: list[int] = field(default_factory=list)
    position: int = 0
    is_stopped: bool = False
    is_constrained: bool = False
    mask: set[int] | None = None  # of the next token alone


class Refusal(Exception):
    """The command must not run."""


class FakeTables:
    """The tables of one epoch of one rank. `idle_micros` is what its reports say."""

    def __init__(
        self,
        settings: FakeSettings,
        config: worker_pb2.EngineConfig,
        num_blocks: int,
        rank: int = 0,
    ) -> None:
        self.idle_micros = 0
        self._settings = settings
        self._config = config
        self._num_blocks = num_blocks
        self._rank = rank
        self._slots: dict[int, _Slot] = {}
        self._rows: dict[int, int] = {}
        self._blocks = BlockRecord()
        self._num_owners = Counter[int]()

    def apply(self, delta: worker_pb2.TableDelta) -> None:
        """Applies the changes of a command; raises Refusal."""
        for (number,) in unpack(delta.closed_slots, 1):
            require(number in self._slots, f"close of slot {number}, which is not open")
            del self._slots[number]
        for opening in delta.opened_slots:
            self._open(opening)
        for number, index, block_id in unpack(delta.block_appends, 3):
            require(index == len(self._slots[number].block_ids), "a block out of turn")
            require(0 < block_id < self._num_blocks, f"block {block_id} is out of range")
            self._slots[number].block_ids.append(block_id)
        for number, limit in unpack(delta.limits, 2):
            slot = self._slots[number]
            require(limit >= slot.limit, "a limit falls")
            slot.limit = limit
        for mask in delta.masks:
            require(self._slots[mask.slot].is_constrained, "a mask for a slot without constraint")
            self._slots[mask.slot].mask = allowed_ids(mask)
        for row, number in unpack(delta.row_changes, 2):
            self._rows.pop(row, None)
            if number:
                self._rows[row] = number
        require(sorted(self._rows) == list(range(delta.row_count)), "rows have holes")
        in_rows = list(self._rows.values())
        require(len(set(in_rows)) == len(in_rows), "a slot has two rows")
        require(set(in_rows) <= set(self._slots), "a row names a closed slot")
        self._check_blocks()

    def _open(self, opening: worker_pb2.SlotOpen) -> None:
        require(opening.slot not in self._slots, f"slot {opening.slot} is open")
        require(1 <= opening.slot <= self._config.max_num_seqs, f"slot {opening.slot} is no slot")
        block_ids = [block_id for (block_id,) in unpack(opening.block_ids, 1)]
        self._slots[opening.slot] = _Slot(
            opening.prompt_len,
            opening.prefill_len,
            opening.limit,
            block_ids,
            tuple(stop_id for (stop_id,) in unpack(opening.stop_ids, 1)),
            opening.min_tokens,
            opening.logprob_count,
            opening.cached_len,
            self._cached_token_ids(opening, block_ids),
            is_constrained=opening.is_constrained,
        )

    def _cached_token_ids(self, opening: worker_pb2.SlotOpen, block_ids: list[int]) -> list[int]:
        """What the slot's cached blocks hold; a refusal if they do not hold a prefix."""
        num_blocks, rest = divmod(opening.cached_len, self._config.block_size)
        where = f"slot {opening.slot}: cached_len {opening.cached_len}"
        require(0 <= opening.cached_len < opening.prefill_len, f"{where} is not in the prefill")
        require(rest == 0, f"{where} is not whole blocks")
        require(num_blocks <= len(block_ids), f"{where} is not covered by its blocks")
        token_ids, wrong = self._blocks.cached(block_ids[:num_blocks], self._config.block_size)
        require(not wrong, f"{where}: {wrong}")
        counts_tokens = (
            opening.repetition_penalty != 1.0
            or opening.presence_penalty != 0.0
            or opening.frequency_penalty != 0.0
        )
        sent = [token_id for (token_id,) in unpack(opening.cached_token_ids, 1)]
        require(sent == (token_ids if counts_tokens else []), f"{where}: other cached_token_ids")
        return token_ids

    def _check_blocks(self) -> None:
        """A block may have several owners, of which none may write to it (`_write`)."""
        for number, slot in self._slots.items():
            is_once = len(set(slot.block_ids)) == len(slot.block_ids)
            require(is_once, f"slot {number} has a block twice")
        self._num_owners = Counter(
            block_id for slot in self._slots.values() for block_id in slot.block_ids
        )
        used = self._num_owners
        require(all(0 < block_id < self._num_blocks for block_id in used), "no such block")
        for slot in self._slots.values():
            covered = len(slot.block_ids) * self._config.block_size
            require(slot.limit <= covered, "a limit is beyond the blocks")
            require(slot.limit < self._config.max_model_len, "a limit is beyond the context")

    def digest(self) -> bytes:
        """Of this worker's own tables, as docs/protocol.md lays them out."""
        words = [len(self._rows), *(self._rows[row] for row in range(len(self._rows)))]
        for number in sorted(self._slots):
            slot = self._slots[number]
            words += [number, slot.prompt_len, slot.prefill_len, slot.limit, len(slot.block_ids)]
            words += slot.block_ids
        packed = struct.pack(f"<{len(words)}i", *words)
        return hashlib.blake2b(packed, digest_size=32).digest()[:8]

    def run(
        self, command: worker_pb2.StepCommand, delta: worker_pb2.TableDelta, arrival_micros: int = 0
    ) -> list[worker_pb2.ExecuteResponse]:
        """Runs the steps of a command whose changes were applied; returns what to report."""
        last_step = command.first_step + command.step_count - 1
        reports = []
        for offset in range(command.step_count):
            entries = [self._decode(self._slots[self._rows[row]]) for row in sorted(self._rows)]
            asked = [self._slots[self._rows[row]].num_logprobs >= 0 for row in sorted(self._rows)]
            if offset == 0:
                for slot, is_final in self._prefill(delta):
                    if is_final:
                        entries.append(self._choose(slot))
                        asked.append(slot.num_logprobs >= 0)
            result = self._result(command, command.first_step + offset, entries, any(asked))
            if offset == 0:
                self._score_prompts(result, delta)
            result.arrival_micros = arrival_micros
            reports.append(worker_pb2.ExecuteResponse(result=result))
        if self._rank == 0 and command.step_count:
            return reports
        progress = worker_pb2.RankProgress(
            command_id=command.command_id,
            step=last_step,
            all_reduce_count=last_step,
            arrival_micros=arrival_micros,
            idle_micros=self.idle_micros,
            comm_micros=self._comm_micros(last_step),
        )
        return [worker_pb2.ExecuteResponse(progress=progress)]

    def _result(
        self,
        command: worker_pb2.StepCommand,
        step: int,
        entries: list[tuple[int, int]],
        with_logprobs: bool,
    ) -> worker_pb2.StepResult:
        result = worker_pb2.StepResult(
            command_id=command.command_id,
            step=step,
            token_ids=struct.pack(f"<{len(entries)}i", *(token for token, _ in entries)),
            flags=bytes(flags for _, flags in entries),
            step_micros=self._settings.step_micros,
            all_reduce_count=step,
            idle_micros=self.idle_micros,
            comm_micros=self._comm_micros(step),
        )
        if with_logprobs:
            count = len(entries)
            result.logprobs = struct.pack(f"<{count}f", *(-0.5 for _ in entries))
            result.top_token_ids = struct.pack(f"<{count * 20}i", *(list(range(20)) * count))
            result.top_logprobs = struct.pack(f"<{count * 20}f", *([-1.0] * 20 * count))
        return result

    def _score_prompts(self, result: worker_pb2.StepResult, delta: worker_pb2.TableDelta) -> None:
        """A wanted token's log-probability is minus a thousandth of its id."""
        behind = {number: token_id for number, token_id in unpack(delta.prompt_targets, 2)}
        scored: list[int] = []
        for number, start, length in unpack(delta.chunks, 3):
            if number in behind:
                slot = self._slots[number]
                end = min(start + length, slot.prompt_len - 1)
                targets = [*slot.token_ids[start + 1 : start + length], behind.pop(number)]
                scored += targets[: max(end - start, 0)]
        assert not behind, "targets without a chunk"
        count = len(scored)
        result.prompt_logprobs = struct.pack(f"<{count}f", *(-token / 1000 for token in scored))
        if count:
            result.prompt_top_token_ids = struct.pack(f"<{count * 20}i", *(list(range(20)) * count))
            result.prompt_top_logprobs = struct.pack(f"<{count * 20}f", *([-1.0] * 20 * count))

    def _comm_micros(self, step: int) -> int:
        return -1 if self._settings.comm_micros < 0 else step * self._settings.comm_micros

    def _prefill(self, delta: worker_pb2.TableDelta) -> list[tuple[_Slot, bool]]:
        token_ids = [token_id for (token_id,) in unpack(delta.chunk_token_ids, 1)]
        run = []
        for number, start, length in unpack(delta.chunks, 3):
            slot = self._slots[number]
            assert start == len(slot.token_ids), "a chunk out of turn"
            assert start + length <= min(slot.prefill_len, slot.limit), "a chunk beyond its limit"
            slot.token_ids += token_ids[:length]
            del token_ids[:length]
            for position in range(start, start + length):
                self._write(slot, position)
            run.append((slot, len(slot.token_ids) == slot.prefill_len))
        assert not token_ids, "ids without a chunk"
        return run

    def _decode(self, slot: _Slot) -> tuple[int, int]:
        assert slot.position >= slot.prefill_len, "a row that is not prefilled"
        if slot.is_stopped or slot.position >= slot.limit:
            return -1, 0
        self._write(slot, slot.position)
        slot.position += 1
        return self._emit(slot)

    def _write(self, slot: _Slot, position: int) -> None:
        block_id = slot.block_ids[position // self._config.block_size]
        assert position >= slot.cached_len, "a cached position is computed again"
        is_shared = self._num_owners[block_id] > 1
        is_allowed = self._settings.rebuilds_shared or not is_shared
        assert is_allowed, f"shared block {block_id} is written"
        write = self._blocks.write_again if is_shared else self._blocks.write
        write(block_id, slot.token_ids, position, self._config.block_size)

    def _choose(self, slot: _Slot) -> tuple[int, int]:
        slot.position = slot.prefill_len
        return self._emit(slot)

    def _emit(self, slot: _Slot) -> tuple[int, int]:
        token = self._settings.choose_token(slot.token_ids)
        if token == self._settings.not_finite_token:
            slot.is_stopped = True
            return -1, FLAG_NOT_FINITE
        if slot.is_constrained:
            assert slot.mask, "a token without a mask of its own"
            token = token if token in slot.mask else min(slot.mask)
            slot.mask = None
        slot.token_ids.append(token)
        num_output = len(slot.token_ids) - slot.prompt_len
        if token in slot.stop_ids and num_output > slot.min_tokens:
            slot.is_stopped = True
            return token, FLAG_STOP
        return token, 0


def allowed_ids(mask: worker_pb2.SlotMask) -> set[int]:
    """What either form allows."""
    if mask.WhichOneof("allowed") == "ids":
        return {token_id for (token_id,) in unpack(mask.ids, 1)}
    return {
        8 * index + bit
        for index, byte in enumerate(mask.bits)
        for bit in range(8)
        if byte >> bit & 1
    }


def unpack(packed: bytes, width: int) -> list[tuple[int, ...]]:
    """Tuples of `width` little-endian int32."""
    return list(struct.iter_unpack(f"<{width}i", packed))


def require(is_met: bool, message: str) -> None:
    if not is_met:
        raise Refusal(message)
