from __future__ import annotations

import math

import torch

from worker.sampling import SlotParams, SlotSampling, add_outputs, mark_prompt
from worker.sampling.penalties import apply_penalties

START = 64


def penalise(params: SlotParams, position: int = 0) -> list[float]:
    """Logits [-2, 4, 8, 1] of ids 64..67 after `params`; 64 and 65 in the prompt, 65 65 66 out."""
    tables = SlotSampling(2, 4, START, torch.device("cpu"))
    tables.set_rows([1], [params])
    mark_prompt(tables, 1, torch.tensor([64, 65]))
    add_outputs(tables, 1, torch.tensor([65, 65, 66]))
    logits = torch.tensor([[-2.0, 4.0, 8.0, 1.0]])
    altered = apply_penalties(logits, torch.tensor([1]), torch.tensor([position]), tables)
    assert logits.tolist() == [[-2.0, 4.0, 8.0, 1.0]]
    result: list[float] = altered[0].tolist()
    return result


def test_row_without_penalties_keeps_its_bits_whatever_was_counted() -> None:
    assert penalise(SlotParams()) == [-2.0, 4.0, 8.0, 1.0]


def test_repetition_shrinks_positive_and_grows_negative_logits_of_prompt_and_output() -> None:
    assert penalise(SlotParams(repetition_penalty=2.0)) == [-4.0, 2.0, 4.0, 1.0]


def test_presence_is_taken_once_and_frequency_per_output_token() -> None:
    assert penalise(SlotParams(presence_penalty=0.5)) == [-2.0, 3.5, 7.5, 1.0]
    assert penalise(SlotParams(frequency_penalty=0.5)) == [-2.0, 3.0, 7.5, 1.0]


def test_repetition_comes_before_presence_and_frequency() -> None:
    params = SlotParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    assert penalise(params) == [-4.0, 1.0, 3.25, 1.0]


def test_stop_ids_are_masked_until_the_minimum_length_is_reached() -> None:
    params = SlotParams(prompt_len=10, min_tokens=3, stop_ids=(64, 67, 63, 68, 67))
    masked = [-math.inf, 4.0, 8.0, -math.inf]
    assert penalise(params, position=10) == masked
    assert penalise(params, position=12) == masked
    assert penalise(params, position=13) == [-2.0, 4.0, 8.0, 1.0]


def test_unused_stop_places_mask_no_column() -> None:
    tables = SlotSampling(2, 4, 0, torch.device("cpu"))
    tables.set_rows([1], [SlotParams(min_tokens=3)])
    logits = torch.ones(1, 4)
    assert torch.equal(
        apply_penalties(logits, torch.tensor([1]), torch.tensor([0]), tables), logits
    )
