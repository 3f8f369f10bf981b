"""What a block of a sequence is found by."""

import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt


class PrefixKeys:
    """Keys of a sequence's full blocks, from position 0 on; each block is hashed once.

    A key is SHA-256 over the key before it and the block's token ids, the first over the hash of
    `salt`: equal keys mean equal salts and equal tokens from position 0 on.
    """

    def __init__(self, salt: bytes) -> None:
        self.salt = salt
        self.keys: list[bytes] = []
        self.num_registered = 0  # of the blocks that the sequence has now
        self._last = hashlib.sha256(salt).digest()

    def extend(
        self,
        tokens_from: Callable[[int, int], npt.NDArray[np.int32]],
        num_blocks: int,
        block_size: int,
    ) -> None:
        """Makes the keys of the first `num_blocks` blocks that are still missing.

        `tokens_from(start, length)` gives the ids of those positions, int32 `[length]`.
        """
        num_known = len(self.keys)
        if num_blocks <= num_known:
            return
        token_ids = tokens_from(num_known * block_size, (num_blocks - num_known) * block_size)
        packed = token_ids.astype("<i4", copy=False).tobytes()
        width = 4 * block_size
        for start in range(0, len(packed), width):
            self._last = hashlib.sha256(self._last + packed[start : start + width]).digest()
            self.keys.append(self._last)
