"""Blocks are free, kept or owned, in any order and under any history."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.block_allocator import DUMMY_BLOCK, BlockAllocator


def shuffled(num_blocks: int, seed: int) -> list[int]:
    order = list(range(1, num_blocks))
    random.Random(seed).shuffle(order)
    return order


class Model:
    """Blocks as sequences see them: who owns which, and what each key must be found to be."""

    def __init__(self, seed: int) -> None:
        self.allocator = BlockAllocator(17, shuffled(17, seed))
        self.owned: list[list[int]] = []
        self.held_key: dict[int, bytes] = {}

    def allocate(self, number: int) -> None:
        num_free = self.allocator.num_free_blocks
        taken = self.allocator.try_allocate(number)
        assert (taken is None) == (number > num_free)
        if taken is not None:
            assert len(taken) == number and DUMMY_BLOCK not in taken
            assert not {block for blocks in self.owned for block in blocks} & set(taken)
            self.owned.append(taken)
            for block_id in taken:  # whatever it held is overwritten
                self.held_key.pop(block_id, None)

    def release(self, number: int) -> None:
        if self.owned:
            self.allocator.release(self.owned.pop(number % len(self.owned)))

    def register(self, number: int) -> None:
        if self.owned and (blocks := self.owned[number % len(self.owned)]):
            block_id, key = blocks[0], bytes([number])
            if block_id not in self.held_key and key not in self.held_key.values():
                self.held_key[block_id] = key
            self.allocator.register(block_id, key)

    def share(self, number: int) -> None:
        found = self.allocator.find([bytes([number]), bytes([number + 1])])
        assert [self.held_key[block_id][0] - number for block_id in found] == [0, 1][: len(found)]
        self.allocator.share(found)
        self.owned.append(found)

    def forget(self, number: int) -> None:
        self.allocator.forget([bytes([number])])
        self.held_key = {b: key for b, key in self.held_key.items() if key != bytes([number])}


@given(
    seed=st.integers(0, 99),
    history=st.lists(
        st.tuples(
            st.sampled_from(["allocate", "release", "register", "share", "forget"]),
            st.integers(0, 9),
        ),
        max_size=40,
    ),
)
def test_any_history_audits_clean_and_finds_only_what_was_not_overwritten(
    seed: int, history: list[tuple[str, int]]
) -> None:
    model = Model(seed)
    for move, number in history:
        getattr(model, move)(number)
        model.allocator.check(model.owned)
        owned = {block_id for block_ids in model.owned for block_id in block_ids}
        assert model.allocator.num_free_blocks == model.allocator.num_usable_blocks - len(owned)


def test_kept_blocks_are_given_out_last_the_tail_of_who_left_first_before_its_head() -> None:
    allocator = BlockAllocator(6)
    sequences = [allocator.try_allocate(2), allocator.try_allocate(2)]
    for index, blocks in enumerate(sequences):
        assert blocks is not None
        for position, block_id in enumerate(blocks):
            allocator.register(block_id, bytes([index, position]))
        allocator.release(blocks)
    assert (allocator.num_free_blocks, allocator.num_kept_blocks) == (5, 4)
    assert allocator.try_allocate(4) == [5, 2, 1, 4]
    assert allocator.find([bytes([1, 0])]) == [3]


def test_a_block_found_again_is_the_last_to_be_given_out() -> None:
    allocator = BlockAllocator(3)
    for key in (b"a", b"b"):
        blocks = allocator.try_allocate(1)
        assert blocks is not None
        allocator.register(blocks[0], key)
    allocator.release([2])
    allocator.release([1])
    allocator.share([2])
    allocator.release([2])
    assert allocator.try_allocate(2) == [1, 2]


def test_an_equal_block_is_not_registered_twice() -> None:
    allocator = BlockAllocator(4)
    blocks = allocator.try_allocate(2)
    assert blocks is not None
    for block_id in blocks:
        allocator.register(block_id, b"same")
    allocator.release(blocks)
    assert (allocator.find([b"same"]), allocator.num_kept_blocks) == ([1], 1)


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
        (lambda allocator, owned: allocator.share([owned[0]]), "wrong count of owners: "),
        (lambda allocator, owned: owned.append(owned[0]), "wrong count of owners: "),
        (lambda allocator, owned: allocator._free.append(4), "more than one place: "),
        (lambda allocator, owned: allocator._kept.pop(4), "neither free nor owned"),
        (lambda allocator, owned: allocator._key_of.pop(4), "kept without a key"),
        (lambda allocator, owned: allocator._block_of.pop(b"kept"), "do not name each other"),
        (lambda allocator, owned: allocator._key_of.update({7: b"x"}), "free blocks with a key"),
        (lambda allocator, owned: allocator._block_of.update(x=4), "name each other"),
    ],
)
def test_audit_finds_a_planted_slip(plant, words: str) -> None:  # type: ignore[no-untyped-def]
    allocator = BlockAllocator(8)
    owned, kept = allocator.try_allocate(3), allocator.try_allocate(1)
    assert owned is not None and kept == [4]
    allocator.register(4, b"kept")
    allocator.release(kept)
    allocator.check([owned])
    plant(allocator, owned)
    with pytest.raises(AssertionError, match=words):
        allocator.check([owned])


@pytest.mark.parametrize("order", [[1, 2], [1, 2, 2], [0, 1, 2], [1, 2, 4]])
def test_an_order_that_does_not_name_every_block_once_is_our_bug(order: list[int]) -> None:
    with pytest.raises(AssertionError):
        BlockAllocator(4, order)
