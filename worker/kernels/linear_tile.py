"""The compiled variants of the dense layer for few rows, and which of them are worth trying."""

from __future__ import annotations

from dataclasses import dataclass

# Measured at these numbers of rows; each choice serves those down to the one before. Beyond, the
# vendor's kernels are as fast.
ROW_BUCKETS = (1, 8, 16, 32, 64)


@dataclass(frozen=True)
class LinearTile:
    """A program's block_n rows of weights, num_groups * block_k elements at a time.

    num_stages of these are on their way. block_m, the rows of x, is 1 for the kernel of one row;
    num_groups of warps share the inner dimension and add up in the end.
    """

    block_m: int
    block_n: int
    block_k: int
    num_groups: int = 1
    num_warps: int = 4
    num_stages: int = 1

    def __str__(self) -> str:
        sizes = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{sizes}/{self.num_groups}/{self.num_warps}/{self.num_stages}"


# Of 60 variants (among them splits over several programs) on the matrices of Llama 8B and Qwen
# 0.6B and 14B at degrees 1, 2 and 4, on an H200: the best of these few is within 2% of the best of
# all on average. Tensor cores take 64 rows of weights at once, which leaves small matrices with
# fewer programs than there are processors; 16 rows and four groups of warps suit those.
_ONE_ROW = (
    LinearTile(1, 2, 1024),
    LinearTile(1, 4, 1024),
    LinearTile(1, 4, 512, num_warps=2),
)
_UP_TO_8 = (
    LinearTile(8, 16, 128, num_groups=4, num_stages=4),
    LinearTile(8, 16, 64, num_groups=4, num_stages=5),
    LinearTile(16, 64, 128, num_stages=5),
)
_UP_TO_16 = (LinearTile(16, 64, 128, num_stages=5), LinearTile(16, 16, 64, 4, num_stages=5))
_UP_TO_32 = (LinearTile(32, 64, 128, num_stages=5),)
_UP_TO_64 = (LinearTile(64, 64, 128, num_stages=4), LinearTile(64, 64, 64, num_stages=6))
_TILES = dict(zip(ROW_BUCKETS, (_ONE_ROW, _UP_TO_8, _UP_TO_16, _UP_TO_32, _UP_TO_64), strict=True))
# More on its way suits some. With an activation there are two tiles of weights: no room for it.
_DEEP = {8: LinearTile(16, 64, 128, num_stages=7), 16: LinearTile(16, 64, 128, num_stages=7)}


def tiles_for(num_rows: int, in_size: int, is_gated: bool) -> tuple[LinearTile, ...]:
    """What to try for `num_rows` of ROW_BUCKETS; nothing where rows of weights are not aligned."""
    if in_size % 16:
        return ()
    tiles = _TILES[num_rows]
    if num_rows in _DEEP and not is_gated:
        tiles = (*tiles, _DEEP[num_rows])
    return tuple(tile for tile in tiles if tile.block_k * tile.num_groups <= in_size)
