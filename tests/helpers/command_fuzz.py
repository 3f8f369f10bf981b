"""Valid step commands and ways to spoil them."""

from __future__ import annotations

import random
import struct
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from protos.lockstep.v1.worker_pb2 import SlotOpen, StepCommand, TableDelta
from tests.helpers.command_maker import CommandMaker, packed

BLOCK_SIZE = 4
MAX_SEQS = 4
NUM_BLOCKS = 61
MAX_MODEL_LEN = 60
VOCAB_SIZE = 200
_BLOCKS_PER_SLOT = 15
_PACKED_FIELDS = (
    *("closed_slots", "block_appends", "limits", "row_changes", "chunks"),
    "prompt_targets",
)
_EXTREMES = (-(2**31), -1, 0, 1, 2, 5, 60, 61, 2**20, 2**31 - 2, 2**31 - 1)
_FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-30, 1e30)


def valid_deltas(rng: random.Random) -> list[tuple[TableDelta, int]]:
    """(delta, steps) of a history in which every slot is opened, decodes and is closed."""
    slots = rng.sample(range(1, MAX_SEQS + 1), MAX_SEQS)
    history = [(_open(rng, slot, row), rng.randint(1, 3)) for row, slot in enumerate(slots)]
    for row, slot in enumerate(slots):
        changes = TableDelta(row_changes=packed(row, slot), row_count=row + 1)
        history.append((changes, rng.randint(0, 8)))
    grow = TableDelta(row_count=MAX_SEQS)
    grow.block_appends = packed(slots[0], 4, _block(slots[0], 4))
    grow.limits = packed(slots[0], 20)
    history.append((grow, 2))
    last = TableDelta(closed_slots=packed(*slots), row_count=0)
    last.row_changes = packed(*(word for row in range(MAX_SEQS) for word in (row, 0)))
    return [*history, (last, 0)]


def spoiled(rng: random.Random, delta: TableDelta, steps: int, maker: CommandMaker) -> StepCommand:
    """The next command with one thing wrong with it, most often with a digest that is right."""
    wrong = TableDelta()
    wrong.CopyFrom(delta)
    kind = rng.randrange(7)
    if kind == 0:
        raw = bytearray(delta.SerializeToString() or b"\0")
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        return maker.next(bytes(raw), steps)
    if kind == 1:
        return maker.next(rng.randbytes(rng.randint(0, 60)), steps)
    if kind == 2:
        _spoil_packed(rng, wrong)
        return maker.next(wrong, steps)
    if kind == 3:
        _spoil_opening(rng, wrong)
        return maker.next(wrong, steps)
    if kind == 4:
        wrong.row_count = rng.choice(_EXTREMES)
        return maker.next(wrong, rng.choice([steps, -1, 64, 65, 2**31 - 1]))
    if kind == 5:
        bits = rng.randbytes(rng.choice([0, 24, 25, 26]))
        ids = packed(rng.choice(_EXTREMES))
        mask = wrong.masks.add(slot=rng.choice(_EXTREMES))
        if rng.random() < 0.5:
            mask.bits = bits
        else:
            mask.ids = ids
        return maker.next(wrong, steps)
    command = maker.next(delta, steps)
    name = rng.choice(["command_id", "epoch", "first_step", "digest", "table_digest"])
    is_bytes = name in ("digest", "table_digest")
    value: bytes | int = rng.randbytes(rng.randint(1, 9)) if is_bytes else rng.choice(_EXTREMES)
    setattr(command, name, value)
    return command


def _open(rng: random.Random, slot: int, num_rows: int) -> TableDelta:
    length = rng.randint(5, 12)
    opening = SlotOpen(
        slot=slot,
        prompt_len=rng.randint(1, length),
        prefill_len=length,
        limit=16,
        block_ids=packed(*(_block(slot, index) for index in range(4))),
        repetition_penalty=1.0,
        presence_penalty=rng.choice([0.0, 0.5]),
        top_p=1.0,
        temperature=rng.choice([0.0, 0.7]),
        seed=rng.randint(-(2**63), 2**63 - 1),
        stop_ids=packed(3, 4),
        logprob_count=rng.randint(-1, 20),
        cached_len=rng.choice([0, 4]),
        bias_ids=packed(5, 6),
        bias_values=struct.pack("<2f", 0.5, -2.0),
        bad_words=[packed(7), packed(8, 9)],
        recent_output_ids=packed(8),
        is_constrained=rng.random() < 0.5,
    )
    if opening.presence_penalty:
        opening.cached_token_ids = packed(*range(opening.cached_len))
    rest = length - opening.cached_len
    delta = TableDelta(
        opened_slots=[opening],
        chunks=packed(slot, opening.cached_len, rest),
        chunk_token_ids=packed(*(rng.randrange(VOCAB_SIZE) for _ in range(rest))),
    )
    if opening.is_constrained:
        delta.masks.add(slot=slot, ids=packed(*range(3, 60)))
    return delta


def _block(slot: int, index: int) -> int:
    return (slot - 1) * _BLOCKS_PER_SLOT + 1 + index


def _spoil_packed(rng: random.Random, delta: TableDelta) -> None:
    name = rng.choice([*_PACKED_FIELDS, "chunk_token_ids"])
    raw = getattr(delta, name)
    words = list(struct.unpack(f"<{len(raw) // 4}i", raw))
    if words and rng.random() < 0.6:
        words[rng.randrange(len(words))] = rng.choice(_EXTREMES)
    else:
        words += [rng.choice(_EXTREMES) for _ in range(rng.randint(1, 6))]
    setattr(delta, name, packed(*words) + b"\0" * rng.choice([0, 0, 0, 1]))


def _spoil_opening(rng: random.Random, delta: TableDelta) -> None:
    opening = delta.opened_slots[0] if delta.opened_slots else delta.opened_slots.add()
    field: Any = rng.choice(SlotOpen.DESCRIPTOR.fields)
    if field.name == "bad_words":
        opening.bad_words.append(rng.randbytes(rng.randint(0, 80)))
    elif field.name == "is_constrained":
        opening.is_constrained = not opening.is_constrained
    elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING:  # packed bytes
        words = [rng.choice(_EXTREMES) for _ in range(rng.randint(0, 20))]
        setattr(opening, field.name, packed(*words) + b"\0" * rng.choice([0, 0, 1]))
    elif field.cpp_type == FieldDescriptor.CPPTYPE_FLOAT:
        setattr(opening, field.name, rng.choice(_FLOATS))
    else:
        setattr(opening, field.name, rng.choice(_EXTREMES))
