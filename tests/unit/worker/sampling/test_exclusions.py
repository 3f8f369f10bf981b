"""Biases, bad words and masks on one shard, and what a slot's next sequence inherits: nothing."""

from __future__ import annotations

import math

import numpy as np
import torch

from worker.sampling import SlotParams, SlotSampling, note_outputs
from worker.sampling.exclusions import restrict

START = 64
LOGITS = [-2.0, 4.0, 8.0, 1.0]


def made(*params: SlotParams) -> SlotSampling:
    """Slots 1, 2, ... with `params`, on the shard of ids 64..67."""
    tables = SlotSampling(len(params) + 1, 4, START, torch.device("cpu"))
    tables.set_rows(range(1, len(params) + 1), params)
    return tables


def restricted(tables: SlotSampling, slot: int = 1) -> list[float]:
    logits = torch.tensor([LOGITS])
    altered = restrict(logits, torch.tensor([slot]), tables.choices, True, True, True)
    assert logits.tolist() == [LOGITS]
    result: list[float] = altered[0].tolist()
    return result


def emit(tables: SlotSampling, *token_ids: int, emits: bool = True) -> None:
    for token_id in token_ids:
        note_outputs(
            tables.choices, torch.tensor([1]), torch.tensor([token_id]), torch.tensor([emits])
        )


def bits_of(*ids: int) -> np.ndarray:
    is_allowed = np.zeros(70, np.bool_)
    is_allowed[list(ids)] = True
    return np.packbits(is_allowed, bitorder="little")


def test_row_without_any_feature_keeps_its_bits() -> None:
    assert restricted(made(SlotParams())) == LOGITS
    tables = made(SlotParams())
    untouched = torch.tensor([LOGITS])
    slots = torch.tensor([1])
    assert restrict(untouched, slots, tables.choices, False, False, False) is untouched


def test_bias_is_added_to_this_shard_s_ids_alone() -> None:
    params = SlotParams(logit_bias=((63, 9.0), (64, 1.5), (67, -100.0), (68, 9.0), (0, 9.0)))
    assert restricted(made(params)) == [-0.5, 4.0, 8.0, -99.0]


def test_bad_word_of_one_id_is_never_chosen() -> None:
    assert restricted(made(SlotParams(bad_words=((65,), (2,))))) == [-2.0, -math.inf, 8.0, 1.0]


def test_last_id_of_a_longer_bad_word_is_masked_once_the_others_are_the_last_outputs() -> None:
    tables = made(SlotParams(bad_words=((7, 9, 66),)))
    emit(tables, 7)
    assert restricted(tables) == LOGITS
    emit(tables, 9)
    assert restricted(tables) == [-2.0, 4.0, -math.inf, 1.0]
    emit(tables, 5, emits=False)
    assert restricted(tables) == [-2.0, 4.0, -math.inf, 1.0]
    emit(tables, 5)
    assert restricted(tables) == LOGITS


def test_longest_bad_word_is_found_in_the_outputs_before_a_preemption() -> None:
    word = (*range(1, 16), 64)
    tables = made(SlotParams(bad_words=(word,), recent_ids=tuple(range(1, 16))))
    assert restricted(tables) == [-math.inf, 4.0, 8.0, 1.0]
    tables = made(SlotParams(bad_words=(word,), recent_ids=tuple(range(2, 16))))
    assert restricted(tables) == LOGITS


def test_mask_holds_until_the_next_and_reaches_no_other_slot() -> None:
    tables = made(SlotParams(is_constrained=True), SlotParams())
    tables.choices.set_masks([(1, bits_of(0, 64, 67))])
    assert restricted(tables) == [-2.0, -math.inf, -math.inf, 1.0]
    assert restricted(tables, slot=2) == LOGITS
    tables.choices.set_masks([(1, bits_of(65))])
    assert restricted(tables) == [-math.inf, 4.0, -math.inf, -math.inf]


def test_next_sequence_in_a_slot_inherits_nothing() -> None:
    everything = SlotParams(
        logit_bias=((64, 1.0),), bad_words=((65,), (7, 66)), recent_ids=(7,), is_constrained=True
    )
    tables = made(everything)
    tables.choices.set_masks([(1, bits_of(64))])
    assert restricted(tables) == [-1.0, -math.inf, -math.inf, -math.inf]
    tables.set_rows([1], [SlotParams()])
    assert restricted(tables) == LOGITS
    fresh = made(SlotParams()).choices
    for name in ("bias_ids", "bias_values", "prefixes", "last_ids", "recent", "masks"):
        assert torch.equal(getattr(tables.choices, name), getattr(fresh, name)), name
