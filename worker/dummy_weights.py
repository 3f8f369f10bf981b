"""Made-up weights for timing: uniform in [-1e-3, 1e-3), the same numbers for every TP degree.

Zeros and constants would time too fast (they compress, and toggle no bits). Each element is a
hash of its tensor's name and its row and column in the full tensor, computed on the device, so a
shard needs no other rank's numbers and no generator's state.
"""

from __future__ import annotations

import zlib
from typing import Final

import torch
from torch import Tensor

from worker.slice_reader import Rectangle

SCALE: Final = 1e-3
_ELEMENTS_AT_ONCE: Final = {"cpu": 1 << 18, "cuda": 1 << 24}  # in cache; few launches


def fill_dummy(destination: Tensor, name: str, area: Rectangle) -> None:
    """Fill `destination`, which is `area` of the full tensor `name`."""
    target = destination if destination.dim() == 2 else destination.unsqueeze(1)
    if not target.numel():
        return
    device = target.device
    columns = _spread(torch.arange(area.num_cols, device=device) + area.col_start, 0x85EBCA6B)
    seed = zlib.crc32(name.encode())
    step = max(_ELEMENTS_AT_ONCE.get(device.type, 1 << 20) // area.num_cols, 1)
    for first in range(0, area.num_rows, step):
        last = min(first + step, area.num_rows)
        rows = torch.arange(first, last, device=device) + (area.row_start + seed)
        mixed = _mix(_spread(rows, 0x9E3779B1)[:, None] + columns)
        target[first:last] = mixed.to(torch.float32).mul_(SCALE / 2**31)


def _spread(indices: Tensor, odd: int) -> Tensor:
    """int64 indices -> int32, multiplied modulo 2**32 and mixed once."""
    product = (indices * odd) & 0xFFFFFFFF
    return _mix((product - ((product & 0x80000000) << 1)).to(torch.int32))


def _mix(x: Tensor) -> Tensor:
    """Half of Mueller's 32-bit integer hash, IN PLACE; int32 products wrap."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x45D9F3B
    x ^= (x >> 16) & 0xFFFF
    return x
