from __future__ import annotations

import math

import pytest
import torch

from worker.sampling import SlotParams, SlotSampling, add_outputs
from worker.sampling_params import MIN_TEMPERATURE

CPU = torch.device("cpu")


def test_every_parameter_arrives_in_its_column_of_the_chosen_slots() -> None:
    tables = SlotSampling(5, 64, 0, CPU)
    params = SlotParams(0.5, 7, 0.25, 0.125, (1 << 64) - 3, 1.5, 0.75, -0.5, 11, 13, (5, 9), 4)
    tables.set_rows([3, 1], [params, SlotParams(temperature=2.0, seed=6)])
    rows = tables.rows(torch.tensor([1, 3, 0]))
    assert rows.temperature.tolist() == [2.0, 0.5, 0.0]
    assert rows.inv_temperature.tolist() == [0.5, 2.0, 1.0]
    assert rows.top_k.tolist() == [0, 7, 0]
    assert rows.top_p.tolist() == [1.0, 0.25, 1.0]
    assert rows.min_p.tolist() == [0.0, 0.125, 0.0]
    assert rows.log_min_p.tolist() == pytest.approx([-math.inf, math.log(0.125), -math.inf])
    assert rows.seed.tolist() == [6, -3, 0]
    assert rows.repetition.tolist() == [1.0, 1.5, 1.0]
    assert rows.presence.tolist() == [0.0, 0.75, 0.0]
    assert rows.frequency.tolist() == [0.0, -0.5, 0.0]
    assert rows.prompt_len.tolist() == [0, 11, 0]
    assert rows.min_tokens.tolist() == [0, 13, 0]
    assert rows.num_logprobs.tolist() == [-1, 4, -1]
    assert rows.stop_ids[1].tolist() == [5, 9] + [-1] * 14
    assert tables.all_rows.top_k.tolist() == [0, 0, 0, 7, 0]


def test_filters_of_a_greedy_row_are_stored_as_off() -> None:
    tables = SlotSampling(2, 64, 0, CPU)
    tables.set_rows([1], [SlotParams(top_k=3, top_p=0.5, min_p=0.5)])
    row = tables.rows(torch.tensor([1]))
    assert (row.top_k.item(), row.top_p.item(), row.min_p.item()) == (0, 1.0, 0.0)


def test_temperature_too_small_for_float32_is_raised_to_the_least() -> None:
    tables = SlotSampling(2, 64, 0, CPU)
    tables.set_rows([1], [SlotParams(temperature=1e-300)])
    assert tables.rows(torch.tensor([1])).temperature.item() == pytest.approx(MIN_TEMPERATURE)


def test_new_sequence_clears_the_counts_of_its_slot_alone() -> None:
    tables = SlotSampling(3, 64, 0, CPU)
    penalised = SlotParams(presence_penalty=1.0)
    tables.set_rows([1, 2], [penalised, penalised])
    for slot in (1, 2):
        add_outputs(tables, slot, torch.tensor([4, 4]))
    tables.set_rows([2], [penalised])
    assert tables.counts[:, 4].tolist() == [0, 2, 0]


@pytest.mark.parametrize("slots", [[0], [3], [-1]])
def test_slot_outside_the_table_is_refused(slots: list[int]) -> None:
    with pytest.raises(ValueError, match="outside 1..2"):
        SlotSampling(3, 64, 0, CPU).set_rows(slots, [SlotParams()])


def test_slots_and_parameters_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 slots and 1 parameter"):
        SlotSampling(3, 64, 0, CPU).set_rows([1, 2], [SlotParams()])


def test_no_rows_change_nothing() -> None:
    tables = SlotSampling(3, 64, 0, CPU)
    before = tables.packed.clone()
    tables.set_rows([], [])
    assert torch.equal(tables.packed, before)
