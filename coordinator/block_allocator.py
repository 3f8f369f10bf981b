"""Which KV blocks are free. Block 0 is the dummy of padded and inert rows, never given out."""

from collections.abc import Iterable, Sequence

import numpy as np

DUMMY_BLOCK = 0


class BlockAllocator:
    """A free list of block ids 1..num_blocks-1.

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

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that sequences can have: all but the dummy."""
        return self.num_blocks - 1

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def try_allocate(self, num_blocks: int) -> list[int] | None:
        """Takes that many blocks, or none and returns None when fewer are free."""
        assert num_blocks >= 0
        if num_blocks > len(self._free):
            return None
        if num_blocks == 0:
            return []
        taken = self._free[-num_blocks:][::-1]
        del self._free[-num_blocks:]
        return taken

    def release(self, block_ids: Sequence[int]) -> None:
        """Gives blocks back. Releasing a block twice is found by `check`, not here."""
        self._free.extend(reversed(block_ids))

    def check(self, owned: Iterable[Sequence[int]]) -> None:
        """Audits: every block is free exactly once or owned exactly once.

        `owned` holds the block ids of each sequence. Raises AssertionError naming the blocks.
        """
        held = [*self._free, *(block_id for block_ids in owned for block_id in block_ids)]
        places = np.bincount(np.array(held, dtype=np.int64), minlength=self.num_blocks)
        assert len(places) == self.num_blocks, f"no such block: {max(held)}"
        assert places[DUMMY_BLOCK] == 0, "the dummy block was given out"
        lost = np.flatnonzero(places[1:] == 0) + 1
        twice = np.flatnonzero(places[1:] > 1) + 1
        assert not lost.size, f"blocks neither free nor owned: {lost.tolist()}"
        assert not twice.size, f"blocks with more than one place: {twice.tolist()}"
