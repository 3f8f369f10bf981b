from __future__ import annotations

import math

import torch

from worker.sampling.ordered_bits import from_ordered, key_ids, key_values, rank_keys, to_ordered

VALUES = torch.tensor(
    [-math.inf, -3.4e38, -1.5, -1e-45, 0.0, 1e-45, 1.0, 1.0000001, 3.4e38, math.inf]
)


def test_integers_are_in_the_order_of_the_floats_and_map_back() -> None:
    ordered = to_ordered(VALUES)
    assert (ordered[1:] > ordered[:-1]).all()
    assert torch.equal(from_ordered(ordered), VALUES)


def test_both_zeros_are_one_integer() -> None:
    assert to_ordered(torch.tensor([-0.0])).item() == to_ordered(torch.tensor([0.0])).item()


def test_keys_put_larger_values_first_and_lower_ids_among_equals() -> None:
    values = torch.tensor([1.0, 2.0, 2.0, -5.0, 1.0])
    ids = torch.tensor([4, 9, 3, 0, 151_642])
    best_first = rank_keys(values, ids).sort(descending=True).values
    assert key_ids(best_first).tolist() == [3, 9, 4, 151_642, 0]
    assert key_values(best_first).tolist() == [2.0, 2.0, 1.0, 1.0, -5.0]
