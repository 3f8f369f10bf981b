"""THRESHOLD: the least scaled logit that min_p, top_k and top_p keep, over sharded vocabularies.

Radix select over the ordered bits of float32, eight bits a pass: each rank adds up its tokens by
digit, the 256 sums are all-reduced, and every rank descends into the digit where the target is
reached. Sums are integers (counts, or masses in fixed point), so they are exact and the same
for any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tpcomm.communicator import Communicator, ReduceOp
from worker.sampling.fixed_point import fixed_mass_reference, nucleus_target
from worker.sampling.mass_kernel import digit_sums_kernel
from worker.sampling.ordered_bits import from_ordered, to_ordered
from worker.sampling.tables import RowParams

NUM_DIGITS = 256
_SHIFTS = (24, 16, 8, 0)
_SIGN = -0x80000000
Target = Callable[[Tensor], Tensor]


def overall_maximum(scaled: Tensor, comm: Communicator) -> Tensor:
    """float32 [N]: maximum over the vocabulary, +inf where a logit is NaN."""
    local = scaled.amax(dim=1)
    return comm.all_reduce(torch.where(local.isnan(), math.inf, local), ReduceOp.MAX)


def kept_from(
    scaled: Tensor,
    rows: RowParams,
    overall_max: Tensor,
    comm: Communicator,
    with_top_k: bool,
    with_top_p: bool,
) -> Tensor:
    """float32 [N]: the least of `scaled` [N, V] (this shard) that every rank's rows keep.

    Flags tell that some row may use the filter; without one its passes are left out.
    """
    least = overall_max + rows.log_min_p
    if with_top_k:
        top_k = rows.top_k.to(torch.int64)
        kth = _select(scaled, least, None, lambda total: torch.minimum(top_k, total), comm)
        least = torch.where(top_k > 0, torch.maximum(kth, least), least)
    if with_top_p:
        nucleus = _select(
            scaled, least, overall_max, lambda total: nucleus_target(rows.top_p, total), comm
        )
        least = torch.where(rows.top_p < 1.0, torch.maximum(nucleus, least), least)
    return least


def _select(
    scaled: Tensor, least: Tensor, overall_max: Tensor | None, target: Target, comm: Communicator
) -> Tensor:
    """float32 [N]: the largest t for which the tokens >= t reach the target.

    Among tokens >= `least` and above -inf. They count 1 each, or their mass where `overall_max`
    is given. `target` maps the total int64 [N] to what is to be reached.
    """
    num_rows = scaled.shape[0]
    prefix = torch.zeros(num_rows, dtype=torch.int32, device=scaled.device)
    above = torch.zeros(num_rows, dtype=torch.int64, device=scaled.device)
    goal = above
    for shift in _SHIFTS:
        sums = comm.all_reduce(digit_sums(scaled, least, overall_max, prefix, shift))
        reached = sums.flip(1).cumsum(dim=1).flip(1) + above[:, None]
        if shift == _SHIFTS[0]:
            goal = target(reached[:, 0])
        # `reached` falls with the digit: the last digit that still reaches the goal.
        digit = ((reached >= goal[:, None]).sum(dim=1, keepdim=True) - 1).clamp(min=0)
        above = (reached.gather(1, digit) - sums.gather(1, digit))[:, 0]
        prefix = prefix | (digit[:, 0].to(torch.int32) << shift)
    return from_ordered(prefix ^ _SIGN)


def digit_sums_reference(
    scaled: Tensor, least: Tensor, overall_max: Tensor | None, prefix: Tensor, shift: int
) -> Tensor:
    """int64 [N, 256]: counts or masses of this shard's tokens by the digit at `shift`.

    Only tokens whose higher digits equal those of `prefix` int32 [N].
    """
    # With the sign bit flipped, the ordered bits compare as unsigned digits.
    digits = to_ordered(scaled) ^ _SIGN
    active = (scaled >= least[:, None]) & (scaled > -math.inf)
    if shift < _SHIFTS[0]:
        active &= ((digits ^ prefix[:, None]) >> (shift + 8)) == 0
    index = ((digits >> shift) & (NUM_DIGITS - 1)).to(torch.int64)
    weight = active.to(torch.int64)
    if overall_max is not None:
        weight = torch.where(active, fixed_mass_reference(scaled, overall_max), 0)
    sums = torch.zeros(scaled.shape[0], NUM_DIGITS, dtype=torch.int64, device=scaled.device)
    return sums.scatter_add_(1, index, weight)


def digit_sums(
    scaled: Tensor, least: Tensor, overall_max: Tensor | None, prefix: Tensor, shift: int
) -> Tensor:
    """`digit_sums_reference`, as one kernel without temporaries on CUDA."""
    if scaled.is_cuda:
        return digit_sums_kernel(scaled, least, overall_max, prefix, shift)
    return digit_sums_reference(scaled, least, overall_max, prefix, shift)
