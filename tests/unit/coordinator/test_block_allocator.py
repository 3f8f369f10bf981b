"""Blocks are free exactly once or owned exactly once, in any order and under any history."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.block_allocator import DUMMY_BLOCK, BlockAllocator


def shuffled(num_blocks: int, seed: int) -> list[int]:
    order = list(range(1, num_blocks))
    random.Random(seed).shuffle(order)
    return order


@given(
    seed=st.integers(0, 99),
    history=st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=40),
)
def test_any_history_audits_clean_and_never_gives_out_the_dummy(
    seed: int, history: list[tuple[bool, int]]
) -> None:
    allocator = BlockAllocator(17, shuffled(17, seed))
    owned: list[list[int]] = []
    for is_allocation, number in history:
        if is_allocation:
            num_free = allocator.num_free_blocks
            taken = allocator.try_allocate(number)
            assert (taken is None) == (number > num_free)
            if taken is not None:
                assert len(taken) == number and DUMMY_BLOCK not in taken
                owned.append(taken)
        elif owned:
            allocator.release(owned.pop(number % len(owned)))
        allocator.check(owned)


def test_blocks_come_in_the_order_given() -> None:
    allocator = BlockAllocator(5, [3, 1, 4, 2])
    assert allocator.try_allocate(3) == [3, 1, 4]
    assert allocator.try_allocate(2) is None
    assert allocator.try_allocate(1) == [2]


def test_released_blocks_come_first_and_in_their_order() -> None:
    allocator = BlockAllocator(6)
    taken = allocator.try_allocate(2)
    assert taken is not None
    allocator.release(taken)
    assert allocator.try_allocate(3) == [1, 2, 3]


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda allocator, owned: allocator.release([owned[0]]), "more than one place: "),
        (lambda allocator, owned: owned.pop(), "neither free nor owned"),
        (lambda allocator, owned: owned.append(99), "no such block: 99"),
        (lambda allocator, owned: owned.append(0), "dummy"),
    ],
)
def test_audit_finds_a_planted_slip(plant, words: str) -> None:  # type: ignore[no-untyped-def]
    allocator = BlockAllocator(8)
    owned = allocator.try_allocate(3)
    assert owned is not None
    allocator.check([owned])
    plant(allocator, owned)
    with pytest.raises(AssertionError, match=words):
        allocator.check([owned])


@pytest.mark.parametrize("order", [[1, 2], [1, 2, 2], [0, 1, 2], [1, 2, 4]])
def test_an_order_that_does_not_name_every_block_once_is_our_bug(order: list[int]) -> None:
    with pytest.raises(AssertionError):
        BlockAllocator(4, order)
