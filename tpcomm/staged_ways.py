"""The ways over staging memory, for preflight to check and time."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcomm.allreduce_kernels import one_shot_launch, two_shot_launch
from tpcomm.gather_kernel import gather_launch
from tpcomm.norm_kernel import FUSED_DTYPES, fused_launch
from tpcomm.paths import CommPath
from tpcomm.size_table import (
    ADD_RMS_NORM,
    ALL_GATHER,
    ALL_REDUCE,
    FUSED,
    ONE_SHOT,
    STAGED,
    TWO_SHOT,
)
from tpcomm.staging import Staging
from tpcomm.staging_tables import CHUNK_BYTES, NUM_WARPS

STAGED_WAYS = (
    (ALL_REDUCE, ONE_SHOT),
    (ALL_REDUCE, TWO_SHOT),
    (ALL_GATHER, STAGED),
    (ADD_RMS_NORM, FUSED),
)


def staged_ways(staging: Staging) -> list[CommPath]:
    """One path each, in the order of STAGED_WAYS."""
    device, limit, tables = staging.device, staging.limit_bytes, staging.tables
    # Of a row, by as many programs as may run, rounded down to what was seen to work (H100: 2 MiB).
    wave_bytes = _power_of_2(tables.max_warps // NUM_WARPS * CHUNK_BYTES)

    def gather_out(tensor: Tensor) -> Tensor:
        shape = (tables.world_size, *tensor.shape)
        return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)

    def prepare_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> object:
        return fused_launch(x, residual, weight, x, eps, tables).compile()

    return [
        CommPath(
            ONE_SHOT,
            device,
            staging.one_shot,
            max_bytes=min(limit, wave_bytes),
            prepare=lambda tensor, op: one_shot_launch(tensor, op, tables).compile(),
        ),
        CommPath(
            TWO_SHOT,
            device,
            staging.two_shot,
            max_bytes=min(limit, tables.world_size * wave_bytes),
            dtypes=FUSED_DTYPES,
            prepare=lambda tensor, op: two_shot_launch(tensor, op, tables).compile(),
        ),
        CommPath(
            STAGED,
            device,
            lambda tensor: staging.all_gather(tensor, gather_out(tensor)),
            operation=ALL_GATHER,
            max_bytes=min(limit, wave_bytes) // 2,
            prepare=lambda tensor: gather_launch(tensor, gather_out(tensor), tables).compile(),
        ),
        CommPath(
            FUSED,
            device,
            staging.all_reduce_add_rms_norm,
            operation=ADD_RMS_NORM,
            max_bytes=limit,
            prepare=prepare_norm,
        ),
    ]


def _power_of_2(value: int) -> int:
    """The largest one that is at most `value`."""
    return 1 << (value.bit_length() - 1)
