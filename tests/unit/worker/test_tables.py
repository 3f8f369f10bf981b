"""The fence and the tables refuse every command that is not the next sensible one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from protos.lockstep.v1.worker_pb2 import SlotMask, SlotOpen, StepCommand, TableDelta
from worker.errors import CommandRefused
from worker.tables import AppliedDelta, BatchTables, CommandFence, TableLimits

LIMITS = TableLimits(
    max_num_seqs=4,
    max_batch_tokens=16,
    max_blocks_per_seq=4,
    max_model_len=13,
    block_size=4,
    num_blocks=9,
    vocab_size=100,
)


def packed(*numbers: int) -> bytes:
    return np.asarray(numbers, "<i4").tobytes()


def opening(slot: int = 1, **fields: object) -> SlotOpen:
    values: dict[str, object] = {
        "prompt_len": 5,
        "prefill_len": 5,
        "limit": 8,
        "block_ids": packed(3, 4),
        "repetition_penalty": 1.0,
    }
    return SlotOpen(slot=slot, **{**values, **fields})  # type: ignore[arg-type]


def whole_prompt(slot: int = 1) -> TableDelta:
    return TableDelta(
        opened_slots=[opening(slot, block_ids=packed(2 * slot, 2 * slot + 1))],
        chunks=packed(slot, 0, 5),
        chunk_token_ids=packed(1, 2, 3, 4, 5),
    )


def decoding_tables() -> BatchTables:
    """Slots 1 and 2 are prefilled and are rows 0 and 1."""
    tables = BatchTables(LIMITS)
    tables.apply(whole_prompt(1))
    tables.apply(whole_prompt(2))
    tables.apply(TableDelta(row_changes=packed(0, 1, 1, 2), row_count=2))
    return tables


def test_applied_delta_lists_every_write_for_the_device() -> None:
    applied = BatchTables(LIMITS).apply(whole_prompt())
    assert applied.blocks == [(1, 0, 2), (1, 1, 3)]
    assert applied.limits == [(1, 8)]
    assert [chunk.is_final for chunk in applied.chunks] == [True]
    assert applied.chunks[0].token_ids.tolist() == [1, 2, 3, 4, 5]


def test_chunks_must_follow_each_other_without_gaps() -> None:
    tables = BatchTables(LIMITS)
    first = TableDelta(
        opened_slots=[opening()], chunks=packed(1, 0, 2), chunk_token_ids=packed(1, 2)
    )
    assert not tables.apply(first).chunks[0].is_final
    rest = TableDelta(chunks=packed(1, 2, 3), chunk_token_ids=packed(3, 4, 5))
    assert tables.apply(rest).chunks[0].is_final


def test_slot_closed_by_a_command_may_be_opened_by_the_same_command() -> None:
    tables = decoding_tables()
    tables.apply(
        TableDelta(
            closed_slots=packed(1),
            opened_slots=[opening(1)],
            row_changes=packed(0, 2, 1, 0),
            row_count=1,
        )
    )
    assert tables.row_slots[:2].tolist() == [2, 0]
    assert not tables.sequences[1].is_decoding


def test_cached_prefix_starts_the_chunks_behind_it_and_counts_its_tokens() -> None:
    tables = decoding_tables()
    cached = opening(3, cached_len=4, presence_penalty=0.5, cached_token_ids=packed(1, 2, 3, 4))
    cached.block_ids = packed(2, 8)  # block 2 is slot 1's
    applied = tables.apply(
        TableDelta(
            opened_slots=[cached],
            chunks=packed(3, 4, 1),
            chunk_token_ids=packed(5),
            row_count=2,
        )
    )
    assert [(c.start, c.token_ids.tolist()) for c in applied.counted] == [(0, [1, 2, 3, 4])]
    assert [(c.start, c.is_final) for c in applied.chunks] == [(4, True)]
    assert tables.sequences[3].is_decoding


def constrained(slot: int, mask: SlotMask) -> TableDelta:
    mask.slot = slot
    return TableDelta(opened_slots=[opening(slot, is_constrained=True)], masks=[mask], row_count=2)


@pytest.mark.parametrize(
    "mask",
    [SlotMask(ids=packed(0, 9, 99)), SlotMask(bits=bytes([1, 2] + [0] * 10 + [8]))],
    ids=["ids", "bits"],
)
def test_both_forms_of_a_mask_give_a_bit_per_id(mask: SlotMask) -> None:
    [(slot, bits)] = decoding_tables().apply(constrained(3, mask)).masks
    assert slot == 3
    assert np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist() == [0, 9, 99]


def test_biases_and_bad_words_reach_the_sampler() -> None:
    values = np.array([0.5, -100.0], "<f4").tobytes()
    opened = opening(
        3,
        bias_ids=packed(4, 90),
        bias_values=values,
        bad_words=[packed(1), packed(2, 3)],
        recent_output_ids=packed(8, 2),
    )
    applied = decoding_tables().apply(TableDelta(opened_slots=[opened], row_count=2))
    params = applied.opened[0].params
    assert params.logit_bias == ((4, 0.5), (90, -100.0))
    assert params.bad_words == ((1,), (2, 3)) and params.recent_ids == (8, 2)


def test_targets_are_the_prompt_s_ids_behind_each_position_that_has_one() -> None:
    tables = BatchTables(LIMITS)
    delta = TableDelta(
        opened_slots=[opening(prompt_len=5, prefill_len=7)],
        chunks=packed(1, 0, 3),
        chunk_token_ids=packed(10, 11, 12),
        prompt_targets=packed(1, 13),
    )
    assert targets_of(tables.apply(delta)) == [11, 12, 13]
    # The last position of the prompt predicts output, as those behind it do.
    rest = TableDelta(chunks=packed(1, 3, 4), chunk_token_ids=packed(13, 14, 1, 2))
    rest.prompt_targets = packed(1, -1)
    assert targets_of(tables.apply(rest)) == [14]


def targets_of(applied: AppliedDelta) -> list[int]:
    [chunk] = applied.chunks
    assert chunk.targets is not None
    found: list[int] = chunk.targets.tolist()
    return found


def with_targets(*pairs: int) -> TableDelta:
    delta = whole_prompt(3)
    delta.prompt_targets = packed(*pairs)
    return delta


REFUSED: dict[str, Callable[[], TableDelta]] = {
    "slot 0 is not in 1..4": lambda: TableDelta(opened_slots=[opening(0)]),
    "slot 5 is not in 1..4": lambda: TableDelta(opened_slots=[opening(5)]),
    "slot 3, which is not open": lambda: TableDelta(closed_slots=packed(3)),
    "slot 1 is open": lambda: TableDelta(opened_slots=[opening(1)]),
    "prompt_len 6 and prefill_len 5": lambda: TableDelta(opened_slots=[opening(3, prompt_len=6)]),
    "block 0 is not in": lambda: TableDelta(opened_slots=[opening(3, block_ids=packed(0))]),
    "block 9 is not in": lambda: TableDelta(opened_slots=[opening(3, block_ids=packed(9))]),
    "limit 9 is not between": lambda: TableDelta(limits=packed(1, 9)),
    "limit 7 is not between": lambda: TableDelta(limits=packed(1, 7)),
    "index 3 is not the next": lambda: TableDelta(block_appends=packed(1, 3, 5)),
    "not a multiple of 12": lambda: TableDelta(block_appends=packed(1, 3)),
    "does not follow": lambda: TableDelta(chunks=packed(1, 0, 1), chunk_token_ids=packed(1)),
    "chunks name 1 token ids, 2 came": lambda: TableDelta(
        opened_slots=[opening(3)], chunks=packed(3, 0, 1), chunk_token_ids=packed(1, 2)
    ),
    "not in 0..99": lambda: TableDelta(
        opened_slots=[opening(3)], chunks=packed(3, 0, 1), chunk_token_ids=packed(100)
    ),
    "row 4 is not in": lambda: TableDelta(row_changes=packed(4, 1), row_count=2),
    "row_count is 1": lambda: TableDelta(row_count=1),
    "name slot 1": lambda: TableDelta(row_changes=packed(1, 1), row_count=2),
    "cached_len -4 is not a multiple": lambda: TableDelta(opened_slots=[opening(3, cached_len=-4)]),
    "cached_len 3 is not a multiple": lambda: TableDelta(opened_slots=[opening(3, cached_len=3)]),
    "cached_len 8 is not a multiple of block_size 4 from 0 to below prefill_len 5": lambda: (
        TableDelta(opened_slots=[opening(3, cached_len=8)])
    ),
    "cached_len 8 is above 4, the positions": lambda: TableDelta(
        opened_slots=[opening(3, prefill_len=9, cached_len=8, block_ids=packed(5))]
    ),
    "chunk 0\\+1 does not follow 4": lambda: TableDelta(
        opened_slots=[opening(3, cached_len=4)], chunks=packed(3, 0, 1), chunk_token_ids=packed(1)
    ),
    "4 cached_token_ids came; its cached_len 4 and penalties want 0": lambda: TableDelta(
        opened_slots=[opening(3, cached_len=4, cached_token_ids=packed(1, 2, 3, 4))]
    ),
    "3 cached_token_ids came; its cached_len 4 and penalties want 4": lambda: TableDelta(
        opened_slots=[
            opening(3, cached_len=4, frequency_penalty=1.0, cached_token_ids=packed(1, 2, 3))
        ]
    ),
    "a cached token id is not in 0..99": lambda: TableDelta(
        opened_slots=[
            opening(3, cached_len=4, frequency_penalty=1.0, cached_token_ids=packed(1, 2, -1, 4))
        ]
    ),
    "limit 13 is not below max_model_len 13": lambda: TableDelta(
        opened_slots=[opening(3, limit=13, block_ids=packed(5, 6, 7, 8))]
    ),
    "temperature is nan": lambda: TableDelta(opened_slots=[opening(3, temperature=float("nan"))]),
    "a mask names no ids": lambda: constrained(3, SlotMask()),
    "a mask's id is not in 0..99": lambda: constrained(3, SlotMask(ids=packed(100))),
    "a mask of 12 bytes is not one of 100 bits": lambda: constrained(3, SlotMask(bits=bytes(12))),
    "a mask of 13 bytes is not": lambda: constrained(3, SlotMask(bits=bytes(12) + b"\x10")),
    "slot 1 is not constrained": lambda: TableDelta(masks=[SlotMask(slot=1, ids=packed(1))]),
    "slot 4, which is not open": lambda: TableDelta(masks=[SlotMask(slot=4, ids=packed(1))]),
    "bias_values has 4 bytes for 2 bias_ids": lambda: TableDelta(
        opened_slots=[opening(3, bias_ids=packed(1, 2), bias_values=bytes(4))]
    ),
    "at most 300 ids": lambda: TableDelta(
        opened_slots=[opening(3, bias_ids=packed(*range(301)), bias_values=bytes(4 * 301))]
    ),
    "of different ids": lambda: TableDelta(
        opened_slots=[opening(3, bias_ids=packed(1, 1), bias_values=bytes(8))]
    ),
    "logit_bias.1. is nan": lambda: TableDelta(
        opened_slots=[opening(3, bias_ids=packed(1), bias_values=b"\0\0\xc0\x7f")]
    ),
    "bad_words is 33": lambda: TableDelta(opened_slots=[opening(3, bad_words=[packed(1)] * 33)]),
    "a bad word is \\(\\), must be 1 to 16": lambda: TableDelta(
        opened_slots=[opening(3, bad_words=[b""])]
    ),
    "recent_ids is": lambda: TableDelta(
        opened_slots=[opening(3, recent_output_ids=packed(*range(16)))]
    ),
    "slot 3: 7 cannot stand behind its chunk": lambda: with_targets(3, 7),
    "slot 3: 100 cannot stand behind": lambda: TableDelta(
        opened_slots=[opening(3)],
        chunks=packed(3, 0, 2),
        chunk_token_ids=packed(1, 2),
        prompt_targets=packed(3, 100),
    ),
    "prompt_targets name slots \\[1\\] without": lambda: with_targets(1, 7, 3, -1),
    "still in prefill": lambda: TableDelta(
        opened_slots=[opening(3)], row_changes=packed(2, 3), row_count=3
    ),
    "rows names slot 2, which is not open": lambda: TableDelta(closed_slots=packed(2), row_count=2),
    "above max_batch_tokens 16": lambda: TableDelta(
        opened_slots=[
            opening(3, prefill_len=12, limit=12, block_ids=packed(6, 7, 8)),
            opening(4, prefill_len=12, limit=12, block_ids=packed(6, 7, 8)),
        ],
        chunks=packed(3, 0, 12, 4, 0, 3),
        chunk_token_ids=packed(*range(15)),
        row_count=2,
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_senseless_delta_is_refused_by_name(message: str) -> None:
    with pytest.raises(CommandRefused, match=message):
        tables = decoding_tables()
        delta = REFUSED[message]()
        if not delta.row_count:
            delta.row_count = 2
        tables.apply(delta)


def test_table_digest_covers_rows_slots_limits_and_blocks() -> None:
    expected = [2, 1, 2, 1, 5, 5, 8, 2, 2, 3, 2, 5, 5, 8, 2, 4, 5]
    digest = hashlib.blake2b(packed(*expected), digest_size=32).digest()[:8]
    assert decoding_tables().digest() == digest


def command(number: int, previous: bytes = bytes(8), **fields: Any) -> StepCommand:
    delta = b"delta"
    values: dict[str, Any] = {
        "command_id": number,
        "epoch": 7,
        "first_step": number,
        "step_count": 1,
        "delta": delta,
        "digest": hashlib.blake2b(previous + delta, digest_size=32).digest()[:8],
    }
    return StepCommand(**{**values, **fields})


def test_commands_in_order_pass_the_fence() -> None:
    fence = CommandFence(epoch=7)
    first = command(1)
    fence.check(first)
    fence.check(command(2, first.digest))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epoch": 6}, "epoch 6, this is 7"),
        ({"command_id": 2}, "command 2 came after 0"),
        ({"command_id": 0}, "command 0 came after 0"),
        ({"first_step": 2}, "the next here is 1"),
        ({"step_count": -1}, "grants -1 steps"),
        ({"digest": bytes(8)}, "coordinator's digest 0000000000000000, ours"),
        ({"delta": b"flipped"}, "digest"),
    ],
)
def test_command_that_is_not_the_next_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CommandRefused, match=message):
        CommandFence(epoch=7).check(command(1, **fields))
