"""Masks in both of their forms."""

import numpy as np
import pytest

from coordinator.grammar.masks import mask_of_bits, packed_mask, without_ids
from tests.helpers.fake_tables import allowed_ids


def ids(mask: np.ndarray) -> list[int]:
    found: list[int] = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
    return found


@pytest.mark.parametrize("num_bytes", [0, 2, 13, 20])
def test_a_mask_is_cut_or_padded_to_the_vocabulary(num_bytes: int) -> None:
    mask = mask_of_bits(b"\xff" * num_bytes, 100)
    assert len(mask) == 13
    assert ids(mask) == list(range(min(8 * num_bytes, 100)))


def test_few_ids_travel_as_ids_and_many_as_bits() -> None:
    few = mask_of_bits(b"\x05" + bytes(50), 400)
    assert packed_mask(few).WhichOneof("allowed") == "ids"
    assert allowed_ids(packed_mask(few)) == {0, 2}
    many = mask_of_bits(b"\x0f" * 50, 400)
    assert packed_mask(many).WhichOneof("allowed") == "bits"
    assert allowed_ids(packed_mask(many)) == set(ids(many))


@pytest.mark.parametrize(("num_ids", "form"), [(12, "ids"), (13, "bits")])
def test_ids_travel_where_they_are_smaller_than_the_bits(num_ids: int, form: str) -> None:
    mask = np.packbits(np.arange(400) < num_ids, bitorder="little")
    packed = packed_mask(mask)  # of 50 bytes, 4 an id
    assert packed.WhichOneof("allowed") == form
    assert allowed_ids(packed) == set(range(num_ids))


def test_ids_are_taken_out_unless_nothing_would_be_left() -> None:
    mask = mask_of_bits(b"\x07", 8)
    assert ids(without_ids(mask, [1])) == [0, 2]
    assert ids(without_ids(mask, [0, 1, 2])) == [0, 1, 2]
    assert ids(mask) == [0, 1, 2]
