"""Who has which KV block. Block 0 is the dummy of padded and inert rows, never given out.

A block is *free*, *owned* by one or more sequences, or *kept*: owned by nobody, but what it holds
can still be found by its key. Kept blocks count as free: when the free list is empty, the one whose
last owner left longest ago is given out and its key forgotten.
"""

from collections.abc import Iterable, Sequence

import numpy as np

DUMMY_BLOCK = 0


class BlockAllocator:
    """Block ids 1..num_blocks-1: a free list, the number of owners of each, and keys.

    Not thread-safe; owned by the engine's event loop. Blocks freed are the first to be given out
    again, while their lines may still be in a cache.
    """

    def __init__(self, num_blocks: int, order: Sequence[int] | None = None) -> None:
        """`num_blocks` counts the dummy; blocks are first given out in `order`."""
        usable = range(DUMMY_BLOCK + 1, num_blocks)
        first_order = list(usable) if order is None else list(order)
        assert sorted(first_order) == list(usable), "order must name every usable block once"
        self.num_blocks = num_blocks
        self._free = first_order[::-1]
        self._num_owners = [0] * num_blocks
        self._kept: dict[int, None] = {}  # in the order in which they are to be given out
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that sequences can have: all but the dummy."""
        return self.num_blocks - 1

    @property
    def num_free_blocks(self) -> int:
        """Blocks without an owner, kept ones included."""
        return len(self._free) + len(self._kept)

    @property
    def num_kept_blocks(self) -> int:
        return len(self._kept)

    def num_owners(self, block_id: int) -> int:
        """Sequences that own a block."""
        return self._num_owners[block_id]

    def try_allocate(self, num_blocks: int) -> list[int] | None:
        """Takes that many blocks for one owner, or none and returns None when fewer are free."""
        assert num_blocks >= 0
        if num_blocks > self.num_free_blocks:
            return None
        num_listed = min(num_blocks, len(self._free))
        taken = self._free[len(self._free) - num_listed :][::-1]
        del self._free[len(self._free) - num_listed :]
        while len(taken) < num_blocks:
            block_id = next(iter(self._kept))
            del self._kept[block_id]
            self._forget(block_id)
            taken.append(block_id)
        for block_id in taken:
            self._num_owners[block_id] = 1
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """Gives blocks that were found one more owner each."""
        for block_id in block_ids:
            if not self._num_owners[block_id]:
                del self._kept[block_id]
            self._num_owners[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Takes an owner from each of a sequence's blocks, given from its head to its tail.

        Those left without are kept if they have a key, the tail to be given out before the head
        without which it cannot be found; the others are free.
        """
        for block_id in reversed(block_ids):
            self._num_owners[block_id] -= 1
            if self._num_owners[block_id]:
                continue
            if block_id in self._key_of:
                self._kept[block_id] = None
            else:
                self._free.append(block_id)

    def register(self, block_id: int, key: bytes) -> None:
        """Makes what an owned block holds findable, unless another block already stands for it."""
        assert self._num_owners[block_id], f"block {block_id} has no owner"
        if key not in self._block_of and block_id not in self._key_of:
            self._block_of[key] = block_id
            self._key_of[block_id] = key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks that stand for `keys`, up to the first for which there is none."""
        found: list[int] = []
        block_of = self._block_of
        for key in keys:
            block_id = block_of.get(key)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def forget(self, keys: Iterable[bytes]) -> None:
        """Makes blocks unfindable; owners keep theirs."""
        for key in keys:
            block_id = self._block_of.get(key)
            if block_id is not None:
                self._forget(block_id)
                if block_id in self._kept:
                    del self._kept[block_id]
                    self._free.append(block_id)

    def forget_kept(self) -> None:
        """Makes every block without an owner unfindable and free."""
        for block_id in self._kept:
            self._forget(block_id)
        self._free.extend(self._kept)
        self._kept.clear()

    def check(self, owned: Iterable[Sequence[int]]) -> None:
        """Audits: every block is free once, kept once, or owned as often as sequences hold it.

        `owned` holds the block ids of each sequence. Raises AssertionError naming the blocks.
        """
        ids = [block_id for block_ids in owned for block_id in block_ids]
        held = np.bincount(np.array(ids, dtype=np.int64), minlength=self.num_blocks)
        assert len(held) == self.num_blocks, f"no such block: {max(ids)}"
        unowned = np.array([*self._free, *self._kept], dtype=np.int64)
        places = np.bincount(unowned, minlength=self.num_blocks)
        assert held[DUMMY_BLOCK] == places[DUMMY_BLOCK] == 0, "the dummy block was given out"
        miscounted = np.flatnonzero(held != np.array(self._num_owners))
        lost = np.flatnonzero(places[1:] + held[1:] == 0) + 1
        twice = np.flatnonzero(places[1:] + (held[1:] > 0) > 1) + 1
        assert not lost.size, f"blocks neither free nor owned: {lost.tolist()}"
        assert not twice.size, f"blocks with more than one place: {twice.tolist()}"
        assert not miscounted.size, f"blocks with a wrong count of owners: {miscounted.tolist()}"
        self._check_keys()

    def _check_keys(self) -> None:
        nameless = [block_id for block_id in self._kept if block_id not in self._key_of]
        assert not nameless, f"blocks kept without a key: {nameless}"
        listed = [block_id for block_id in self._free if block_id in self._key_of]
        assert not listed, f"free blocks with a key: {listed}"
        inverse = {block_id: key for key, block_id in self._block_of.items()}
        is_one_to_one = inverse == self._key_of and len(inverse) == len(self._block_of)
        assert is_one_to_one, "keys and blocks do not name each other"

    def _forget(self, block_id: int) -> None:
        del self._block_of[self._key_of.pop(block_id)]
