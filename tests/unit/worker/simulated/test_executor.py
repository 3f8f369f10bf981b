"""Simulated steps follow the device's rules, and their tokens are those that were foreseen."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from protos.lockstep.v1.worker_pb2 import SlotOpen, StepResult, TableDelta
from tests.helpers.command_maker import CommandMaker, packed
from tests.helpers.simulated_tokens import simulated_output
from worker.simulated.executor import SimulatedExecutor
from worker.simulated.slots import SimulatedSlots
from worker.simulated.timing import SimulatedDevice, SimulationAborted, StepCost
from worker.simulated.tokens import TokenChooser
from worker.tables import TableLimits

VOCABULARY = list(range(200))
PROMPT = [5, 9, 117, 31, 77, 8, 150, 3, 90]
LIMITS = TableLimits(
    max_num_seqs=4,
    max_batch_tokens=64,
    max_blocks_per_seq=20,
    max_model_len=80,
    block_size=4,
    num_blocks=61,
    vocab_size=200,
)


class Driven:
    """An executor, and commands for it."""

    def __init__(self, stop_probability: float = 0.0, seed: int = 3, **cost: float) -> None:
        chooser = TokenChooser(np.array(VOCABULARY, np.int32), stop_probability)
        slots = SimulatedSlots(LIMITS.max_num_seqs + 1, LIMITS.vocab_size, chooser, seed)
        values = {"step_s": 0.0, "row_s": 0.0, "prefill_s": 0.0, "jitter": 0.0, **cost}
        self.device = SimulatedDevice()
        self.executor = SimulatedExecutor(
            1, LIMITS, slots, StepCost(seed=seed, **values), self.device
        )
        self.maker = CommandMaker(epoch=1)

    def results(self, delta: TableDelta, steps: int = 1) -> list[StepResult]:
        command = self.maker.next(delta, steps)
        return [step.result() for step in self.executor.execute(command, arrived=0.0)]

    def run(self, delta: TableDelta, steps: int = 1) -> list[list[int]]:
        """Tokens of every step."""
        return [tokens(result) for result in self.results(delta, steps)]


def tokens(result: StepResult) -> list[int]:
    return [int(token) for token in np.frombuffer(result.token_ids, "<i4")]


def opening(slot: int, **fields: Any) -> SlotOpen:
    values: dict[str, Any] = {
        "prompt_len": len(PROMPT),
        "prefill_len": len(PROMPT),
        "limit": 48,
        "block_ids": packed(*range(15 * slot - 14, 15 * slot)),
        "repetition_penalty": 1.0,
        "top_p": 1.0,
        "logprob_count": -1,
    }
    return SlotOpen(slot=slot, **{**values, **fields})


def prefill(opened: SlotOpen, token_ids: list[int], rows: int = 0) -> TableDelta:
    start = opened.cached_len
    return TableDelta(
        opened_slots=[opened],
        chunks=packed(opened.slot, start, len(token_ids) - start),
        chunk_token_ids=packed(*token_ids[start:]),
        row_count=rows,
    )


def output(driven: Driven, opened: SlotOpen, steps: list[int]) -> list[int]:
    """Prefills a slot and runs it in row 0, in commands of so many steps."""
    got = driven.run(prefill(opened, PROMPT))
    rows = TableDelta(row_changes=packed(0, opened.slot), row_count=1)
    for count in steps:
        got += driven.run(rows, count)
        rows = TableDelta(row_count=1)
    return [entry for step in got for entry in step]


@pytest.mark.parametrize("steps", [[1] * 16, [8, 8], [3, 8, 5]])
def test_tokens_are_the_foreseen_ones_however_the_steps_are_granted(steps: list[int]) -> None:
    expected = simulated_output(PROMPT, 17, vocabulary=VOCABULARY, daemon_seed=3)
    assert output(Driven(), opening(1), steps) == expected
    assert len(set(expected)) > 8
    other = output(Driven(), opening(1, temperature=1.0, seed=-2), steps)
    assert other == simulated_output(
        PROMPT, 17, vocabulary=VOCABULARY, daemon_seed=3, request_seed=2**64 - 2
    )


def test_a_row_goes_inert_at_its_limit_in_the_middle_of_a_run() -> None:
    driven = Driven()
    got = output(driven, opening(1, limit=len(PROMPT) + 3), [8])
    expected = simulated_output(PROMPT, 8, vocabulary=VOCABULARY, daemon_seed=3)
    assert got == [*expected[:4], -1, -1, -1, -1, -1]
    raised = TableDelta(limits=packed(1, len(PROMPT) + 5), row_count=1)
    assert driven.run(raised, steps=3) == [[expected[4]], [expected[5]], [-1]]


def test_stop_ids_come_by_chance_after_min_tokens_and_end_the_row() -> None:
    lengths = set()
    for seed in range(12):
        driven = Driven(stop_probability=0.2, seed=seed)
        opened = opening(1, stop_ids=packed(7, 11), min_tokens=4)
        expected = simulated_output(
            PROMPT,
            25,
            vocabulary=VOCABULARY,
            daemon_seed=seed,
            stop_ids=(7, 11),
            stop_probability=0.2,
            min_tokens=4,
        )
        got = output(driven, opened, [8, 8, 8])
        assert got == expected + [-1] * (25 - len(expected))
        assert len(expected) > 4
        lengths.add(len(expected))
    assert len(lengths) > 3


def test_a_stop_says_so_by_its_flag() -> None:
    driven = Driven(stop_probability=1.0)
    (first,) = driven.results(prefill(opening(1, stop_ids=packed(7)), PROMPT))
    assert (tokens(first), first.flags) == ([7], b"\x01")


def test_cached_prefix_and_preemption_change_no_token() -> None:
    driven = Driven()
    alone = output(driven, opening(1), [8, 8])
    again = [*PROMPT, *alone[:6]]
    blocks = np.frombuffer(opening(1).block_ids, "<i4").tolist()
    resumed = opening(2, prefill_len=len(again), cached_len=12)
    resumed.block_ids = packed(*blocks[:3], *np.frombuffer(opening(2).block_ids, "<i4")[3:])
    got = driven.run(prefill(resumed, again, rows=1))[0][-1:]
    rows = TableDelta(row_changes=packed(0, 2), row_count=1)
    got += [entry for step in driven.run(rows, 4) for entry in step]
    assert got == alone[6:11]


def test_log_probabilities_are_well_formed_where_some_row_wants_them() -> None:
    driven = Driven()
    (silent,) = driven.results(prefill(opening(1), PROMPT))
    assert not silent.logprobs and not silent.top_token_ids
    (first,) = driven.results(prefill(opening(2, logprob_count=2), PROMPT))
    top_ids = np.frombuffer(first.top_token_ids, "<i4").reshape(-1, 20)
    top = np.frombuffer(first.top_logprobs, "<f4").reshape(-1, 20)
    assert top_ids[0, 0] == tokens(first)[0] and len(set(top_ids[0].tolist())) == 20
    assert (np.diff(top[0]) < 0).all() and np.exp(top[0]).sum() < 1.0
    assert np.frombuffer(first.logprobs, "<f4")[0] == top[0, 0]


def test_steps_end_at_absolute_deadlines() -> None:
    driven = Driven(step_s=0.010, row_s=0.001, prefill_s=0.002)
    begun = time.monotonic()
    command = driven.maker.next(prefill(opening(1), PROMPT), 1)
    (step,) = driven.executor.execute(command, arrived=begun)
    assert [*step.wait()] == pytest.approx([0.028, begun + 0.028])
    command = driven.maker.next(TableDelta(row_changes=packed(0, 1), row_count=1), 3)
    # It arrives in the middle of the step before, so its own follow without a gap.
    ends = [s.wait().ended for s in driven.executor.execute(command, arrived=begun + 0.005)]
    assert ends == pytest.approx([begun + 0.039, begun + 0.050, begun + 0.061])
    assert time.monotonic() >= ends[-1]


def test_jitter_is_the_same_on_every_rank_and_within_its_share() -> None:
    costs = [StepCost(0.01, 0.0, 0.0, 0.25, seed=1) for _ in range(2)]
    times = [[cost.seconds(step, 4, 0) for step in range(1, 200)] for cost in costs]
    assert times[0] == times[1] and len(set(times[0])) == 199
    assert 0.0075 <= min(times[0]) < 0.008 and 0.012 < max(times[0]) <= 0.0125


def test_abort_wakes_a_step_that_sleeps() -> None:
    driven = Driven(step_s=60.0)
    timer = threading.Timer(0.05, driven.device.abort)
    timer.start()
    command = driven.maker.next(TableDelta(), 1)
    with pytest.raises(SimulationAborted):
        list(driven.executor.execute(command, arrived=time.monotonic()))
    timer.join(5)


def test_a_constrained_slot_chooses_what_its_mask_allows_and_stops_at_a_stop_id() -> None:
    driven = Driven()
    delta = prefill(opening(1, limit=9, is_constrained=True, stop_ids=packed(7)), PROMPT)
    delta.masks.add(slot=1, ids=packed(20, 21, 22))
    assert driven.run(delta)[0][0] in (20, 21, 22)
    delta = TableDelta(row_changes=packed(0, 1), row_count=1, limits=packed(1, 10))
    delta.masks.add(slot=1, ids=packed(7))
    first, second = driven.results(delta, steps=2)
    assert (tokens(first), first.flags) == ([7], b"\x01")
    assert tokens(second) == [-1]


def test_prompt_log_probabilities_are_well_formed() -> None:
    delta = prefill(opening(1), PROMPT)
    delta.prompt_targets = packed(1, -1)
    [result] = Driven().results(delta)
    count = len(PROMPT) - 1
    assert len(result.prompt_logprobs) == 4 * count
    top_ids = np.frombuffer(result.prompt_top_token_ids, "<i4").reshape(count, 20)
    assert top_ids[:, 0].tolist() == PROMPT[1:]
    assert len(result.prompt_top_logprobs) == 80 * count
