"""Counter-based noise: what a row draws for a token depends on (seed, position, token id) alone.

So every rank, batch shape and variant sees the same noise without any state. Philox-4x32-10 is
from Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_WORD = 0xFFFFFFFF
_NUM_ROUNDS = 10
_Block = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_4x32(counter: _Block, key: tuple[Tensor, Tensor]) -> _Block:
    """Ten rounds over 32-bit words held in int64 tensors (values 0..2**32-1) that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        # The product wraps modulo 2**64: its bits are those of the unsigned one.
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0 = ((product_1 >> 32) & _WORD) ^ c1 ^ k0
        c2 = ((product_0 >> 32) & _WORD) ^ c3 ^ k1
        c1 = product_1 & _WORD
        c3 = product_0 & _WORD
        k0 = (k0 + _WEYL_0) & _WORD
        k1 = (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def gumbel_from_bits(bits: Tensor) -> Tensor:
    """Standard Gumbel float32 from 32-bit words in int64; never infinite.

    u lies in [2**-33, 1 - 2**-24]: log1p keeps the precision of small u, where the large values
    come from.
    """
    uniform = (bits.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp_(max=1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def gumbel_at_reference(seed: Tensor, position: Tensor, token_ids: Tensor) -> Tensor:
    """float32 [N, C] noise of `token_ids` int64 [N, C]; seed and position are int64 [N]."""
    words = _words(seed, position, token_ids >> 2)
    lane = token_ids & 3
    bits = torch.where(lane == 0, words[0], words[1])
    bits = torch.where(lane == 2, words[2], bits)
    return gumbel_from_bits(torch.where(lane == 3, words[3], bits))


def gumbel_range_reference(seed: Tensor, position: Tensor, first_id: int, count: int) -> Tensor:
    """float32 [N, count] noise of ids first_id .. first_id + count - 1."""
    first_group, last_group = first_id >> 2, (first_id + count + 3) >> 2
    groups = torch.arange(first_group, last_group, device=seed.device)[None, :]
    bits = torch.stack(_words(seed, position, groups), dim=-1).flatten(1)
    offset = first_id - 4 * first_group
    return gumbel_from_bits(bits[:, offset : offset + count])


def _words(seed: Tensor, position: Tensor, group: Tensor) -> _Block:
    """The four words of counter (position, group, 0, 0) under the 64-bit seed as key."""
    key = ((seed & _WORD)[:, None], ((seed >> 32) & _WORD)[:, None])
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    return philox_4x32(((position & _WORD)[:, None], group, zero, zero), key)
