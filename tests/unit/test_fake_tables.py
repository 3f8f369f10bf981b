"""The fake worker proves that cached blocks hold the prefix they are said to hold."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from protos.lockstep.v1.worker_pb2 import EngineConfig, SlotOpen, StepCommand, TableDelta
from tests.helpers.fake_tables import FakeTables, Refusal
from tests.helpers.fake_worker import FakeSettings, expected_output

PROMPT = [5, 9, 200, 31, 77, 8, 150, 3, 90]  # two full blocks and one token
OTHER = [5, 9, 200, 31, 1, 1, 1, 1, 1]


def packed(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}i", *numbers)


def opening(slot: int, *block_ids: int, cached_len: int = 0, **fields: object) -> SlotOpen:
    values: dict[str, object] = {
        "prompt_len": 9,
        "prefill_len": 9,
        "limit": 4 * len(block_ids),
        "repetition_penalty": 1.0,
        "logprob_count": -1,
    }
    return SlotOpen(
        slot=slot,
        block_ids=packed(*block_ids),
        cached_len=cached_len,
        **{**values, **fields},  # type: ignore[arg-type]
    )


class Driven:
    """Fake tables and the steps that they ran."""

    def __init__(self) -> None:
        config = EngineConfig(block_size=4, max_num_seqs=4, max_model_len=100)
        self.settings = FakeSettings()
        self.tables = FakeTables(self.settings, config, num_blocks=20)
        self.step = 1

    def run(self, delta: TableDelta, steps: int = 1) -> list[list[int]]:
        self.tables.apply(delta)
        command = StepCommand(command_id=1, first_step=self.step, step_count=steps)
        self.step += steps
        results = [report.result for report in self.tables.run(command, delta)]
        return [[token for (token,) in struct.iter_unpack("<i", r.token_ids)] for r in results]

    def prefill(self, opened: SlotOpen, token_ids: list[int]) -> list[list[int]]:
        start = opened.cached_len
        rest = token_ids[start:]
        return self.run(
            TableDelta(
                opened_slots=[opened],
                chunks=packed(opened.slot, start, len(rest)),
                chunk_token_ids=packed(*rest),
            )
        )


@pytest.fixture
def driven() -> Driven:
    """Slot 1 holds PROMPT in blocks 1 to 4, slot 2 OTHER in blocks 5 to 8."""
    driven = Driven()
    driven.prefill(opening(1, 1, 2, 3, 4), PROMPT)
    driven.prefill(opening(2, 5, 6, 7, 8), OTHER)
    return driven


def test_a_slot_with_shared_blocks_gets_the_tokens_that_it_gets_alone(driven: Driven) -> None:
    first = driven.prefill(opening(3, 1, 2, 9, 10, cached_len=8), PROMPT)
    rows = TableDelta(row_changes=packed(0, 3, 1, 1), row_count=2)
    steps = driven.run(rows, steps=8)
    expected = expected_output(PROMPT, 8)
    # The limit, 16 positions, is met in the middle of the run.
    assert [first[0][0], *(step[0] for step in steps)] == [*expected, -1]
    assert [step[1] for step in steps] == [*expected[1:], -1]


def test_a_generated_block_may_be_shared_only_once_it_is_written(driven: Driven) -> None:
    rows = TableDelta(row_changes=packed(0, 1), row_count=1)
    output = expected_output(PROMPT, 5)
    driven.run(rows, steps=3)  # positions 9, 10, 11: block 3 is full
    longer = opening(3, 1, 2, 3, 9, cached_len=12, prompt_len=13, prefill_len=13)
    turn = [*PROMPT, *output[:4]]
    result = driven.run(
        TableDelta(
            opened_slots=[longer],
            chunks=packed(3, 12, 1),
            chunk_token_ids=packed(turn[12]),
            row_count=1,
        )
    )
    assert result == [[output[4], output[4]]]


def block_of_another_chain() -> SlotOpen:
    return opening(3, 6, 2, 9, cached_len=8)


def block_not_full() -> SlotOpen:
    return opening(3, 1, 2, 3, 9, cached_len=12, prompt_len=13, prefill_len=13)


def block_never_written() -> SlotOpen:
    return opening(3, 9, 10, 11, cached_len=4)


REFUSED: dict[str, Callable[[], SlotOpen]] = {
    "block 6 was not written after its prefix": block_of_another_chain,
    "block 3 holds 1 of 4": block_not_full,
    "block 9 holds 0 of 4": block_never_written,
    "not whole blocks": lambda: opening(3, 1, 2, 9, cached_len=6),
    "not in the prefill": lambda: opening(3, 1, 2, 9, cached_len=12),
    "not covered": lambda: opening(3, 1, cached_len=8),
    "other cached_token_ids": lambda: opening(
        3, 1, 2, 9, cached_len=8, presence_penalty=0.5, cached_token_ids=packed(*OTHER[:8])
    ),
    "cached_len 4: other cached_token_ids": lambda: opening(
        3, 1, 2, 9, cached_len=4, cached_token_ids=packed(*PROMPT[:4])
    ),
    "has a block twice": lambda: opening(3, 1, 1, 9, cached_len=4),
}


@pytest.mark.parametrize("message", REFUSED)
def test_cached_blocks_that_do_not_hold_the_prefix_are_refused(
    driven: Driven, message: str
) -> None:
    with pytest.raises(Refusal, match=message):
        driven.tables.apply(TableDelta(opened_slots=[REFUSED[message]()]))


def test_a_block_overwritten_by_another_sequence_gives_other_tokens(driven: Driven) -> None:
    # Slot 1's blocks go to a sequence that begins otherwise; a late hit on them is a slip.
    driven.run(TableDelta(closed_slots=packed(1)))
    driven.prefill(opening(1, 1, 2, 3), [7, *PROMPT[1:]])
    first = driven.prefill(opening(3, 1, 2, 9, cached_len=8), PROMPT)
    assert first != [expected_output(PROMPT, 1)]


def test_writing_to_a_shared_block_is_caught(driven: Driven) -> None:
    driven.tables.apply(TableDelta(opened_slots=[opening(3, 1, 2, 3, cached_len=8)]))
    delta = TableDelta(chunks=packed(3, 8, 1), chunk_token_ids=packed(PROMPT[8]))
    with pytest.raises(AssertionError, match="shared block 3 is written"):
        driven.run(delta)


@pytest.mark.parametrize(
    ("token_ids", "problem"),
    [
        (PROMPT, ""),
        ([*PROMPT[:3], 1, *PROMPT[4:]], "shared block 1 gets another token"),
        ([1, *PROMPT[1:]], "shared block 1 gets another token"),
        ([*PROMPT[:7], 1, 1], "shared block 2 gets another token"),
    ],
)
def test_a_shared_block_is_rebuilt_only_as_it_is_and_only_where_allowed(
    driven: Driven, token_ids: list[int], problem: str
) -> None:
    again = opening(3, 1, 2, 9, 10)
    with pytest.raises(AssertionError, match="shared block 1 is written"):
        driven.prefill(again, token_ids)
    driven.run(TableDelta(closed_slots=packed(3)))
    driven.settings.rebuilds_shared = True
    if problem:
        with pytest.raises(AssertionError, match=problem):
            driven.prefill(again, token_ids)
    else:
        assert driven.prefill(again, token_ids) == [[expected_output(PROMPT, 1)[0]]]
