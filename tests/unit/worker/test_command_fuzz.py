"""Spoiled commands end as refusals or are legal: nothing else is ever raised."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.lockstep.v1.worker_pb2 import SlotOpen, StepCommand, TableDelta
from tests.helpers import command_fuzz
from tests.helpers.command_maker import CommandMaker, packed
from worker.command_gate import CommandGate
from worker.errors import CommandRefused
from worker.simulated.executor import SimulatedExecutor
from worker.simulated.slots import SimulatedSlots
from worker.simulated.timing import SimulatedDevice, StepCost
from worker.simulated.tokens import TokenChooser
from worker.tables import TableLimits

LIMITS = TableLimits(
    max_num_seqs=command_fuzz.MAX_SEQS,
    max_batch_tokens=64,
    max_blocks_per_seq=15,
    max_model_len=command_fuzz.MAX_MODEL_LEN,
    block_size=command_fuzz.BLOCK_SIZE,
    num_blocks=command_fuzz.NUM_BLOCKS,
    vocab_size=command_fuzz.VOCAB_SIZE,
)


def make_executor() -> SimulatedExecutor:
    chooser = TokenChooser(np.arange(LIMITS.vocab_size, dtype=np.int32), 0.1)
    slots = SimulatedSlots(LIMITS.max_num_seqs + 1, LIMITS.vocab_size, chooser, seed=0)
    cost = StepCost(0.0, 0.0, 0.0, 0.0, 0)
    return SimulatedExecutor(1, LIMITS, slots, cost, SimulatedDevice())


def run(executor: SimulatedExecutor, command: StepCommand) -> bool:
    """Runs a command to its end; whether it was legal. Legal ones have sound results."""
    try:
        for step in executor.execute(command, arrived=0.0):
            token_ids = np.frombuffer(step.result().token_ids, "<i4")
            assert len(step.result().flags) == len(token_ids)
            assert token_ids.min(initial=0) >= -1
            assert token_ids.max(initial=0) < LIMITS.vocab_size
    except CommandRefused as refusal:
        assert str(refusal)
        return False
    return True


@given(st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_unspoiled_histories_are_legal(seed: int) -> None:
    executor, maker = make_executor(), CommandMaker(1)
    for delta, steps in command_fuzz.valid_deltas(random.Random(seed)):
        assert run(executor, maker.next(delta, steps))


@given(st.integers(0, 2**64))
@settings(max_examples=1500, deadline=None)
def test_a_spoiled_command_is_refused_or_legal_and_so_are_those_after_it(seed: int) -> None:
    rng = random.Random(seed)
    executor, maker = make_executor(), CommandMaker(1)
    history = command_fuzz.valid_deltas(rng)
    at = rng.randrange(len(history))
    for index, (delta, steps) in enumerate(history):
        if index == at or (index > at and rng.random() < 0.5):
            command = command_fuzz.spoiled(rng, delta, steps, maker)
        else:
            command = maker.next(delta, steps)
        if not run(executor, command):
            return


@given(st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_any_bytes_as_delta_are_refused_or_legal(delta: bytes) -> None:
    run(make_executor(), CommandMaker(1).next(delta))


@pytest.mark.parametrize(
    ("delta", "steps", "message"),
    [
        (b"\xff\xff\xff", 1, "its delta is no TableDelta"),
        (TableDelta(), 65, "grants 65 steps .* grants 0 to 64"),
        (TableDelta(), 2**31 - 1, "grants 2147483647 steps"),
        (TableDelta(row_count=-1), 1, "row_count is -1"),
        (TableDelta(chunks=packed(1, 0, 1)), 0, "has chunks but grants no step"),
        (TableDelta(opened_slots=[SlotOpen(slot=-(2**31))]), 1, "is not in 1..4"),
    ],
)
def test_what_fuzzing_found_is_refused_by_name(
    delta: TableDelta | bytes, steps: int, message: str
) -> None:
    with pytest.raises(CommandRefused, match=message):
        CommandGate(1, LIMITS).accept(CommandMaker(1).next(delta, steps))
