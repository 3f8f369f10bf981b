"""What a path is called with before it is trusted, and what must come out.

Inputs are small integers, so that any order of summation gives the same bits; what is expected is
computed on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpcomm.communicator import ReduceOp
from tpcomm.norm_kernel import FUSED_DTYPES, add_rms_norm_reference
from tpcomm.paths import CommPath
from tpcomm.size_table import ADD_RMS_NORM, ALL_GATHER

_LARGE_BYTES = 1 << 20
_GATHERED_DTYPES = (torch.uint8, torch.int64, torch.bfloat16)
_EPS = 1e-5
_RESIDUAL_RANK = 40  # residual and weight are inputs of ranks that do not exist
_WEIGHT_RANK = 41


@dataclass(frozen=True)
class Case:
    """One call: the input's shape and dtype; `op` of a reduction."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    op: ReduceOp = ReduceOp.SUM

    @property
    def num_bytes(self) -> int:
        """Of the input."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def cases_of(path: CommPath) -> list[Case]:
    """Every dtype the operation takes, with and without whole vectors, and the largest message."""
    if path.operation == ADD_RMS_NORM:
        shapes = ((1, 64), (3, 333), (5, 4096))
        return _fitting([Case(shape, dtype) for dtype in FUSED_DTYPES for shape in shapes], path)
    gathers = path.operation == ALL_GATHER
    kinds = _GATHERED_DTYPES if gathers else path.dtypes
    cases = [Case((size,), dtype) for dtype in kinds for size in (1, 333, 4096)]
    if not gathers:
        cases.append(Case((4096,), torch.float32, ReduceOp.MAX))
    most = (path.max_bytes or _LARGE_BYTES) // torch.bfloat16.itemsize
    return [*_fitting(cases, path), Case((most,), torch.bfloat16)]


def _fitting(cases: Sequence[Case], path: CommPath) -> list[Case]:
    return [case for case in cases if not path.max_bytes or 4 * case.num_bytes <= path.max_bytes]


def make_arguments(path: CommPath, case: Case, rank: int) -> tuple[object, ...]:
    """What rank `rank` calls the path with."""
    tensor = _integers(rank, case.shape).to(case.dtype).to(path.device)
    if path.operation == ALL_GATHER:
        return (tensor,)
    if path.operation == ADD_RMS_NORM:
        residual = _integers(_RESIDUAL_RANK, case.shape).to(case.dtype).to(path.device)
        weight = _integers(_WEIGHT_RANK, case.shape[1:]).to(case.dtype).to(path.device)
        return tensor, residual, weight, _EPS
    return tensor, case.op


def find_mistake(
    path: CommPath, case: Case, arguments: Sequence[object], result: Tensor, world_size: int
) -> str:
    """What is wrong with `result`, or with what was to be changed in place; empty if nothing."""
    parts = [_integers(rank, case.shape) for rank in range(world_size)]
    if path.operation == ALL_GATHER:
        return _differences(result, torch.stack(parts).to(case.dtype), case)
    total = parts[0]
    for part in parts[1:]:
        total = torch.maximum(total, part) if case.op == ReduceOp.MAX else total + part
    total = total.to(case.dtype)
    if path.operation != ADD_RMS_NORM:
        return _differences(result, total, case)
    residual = _integers(_RESIDUAL_RANK, case.shape).to(case.dtype)
    weight = _integers(_WEIGHT_RANK, case.shape[1:]).to(case.dtype)
    normed = add_rms_norm_reference(total, residual, weight, _EPS)
    updated = arguments[1]
    assert isinstance(updated, Tensor)
    mistake = _differences(updated, residual, case)
    if mistake:
        return f"residual, {mistake}"
    # The sum of squares is taken in another order: all but the last bits agree.
    tolerance = 4 * torch.finfo(case.dtype).eps
    close = torch.isclose(result.cpu().double(), normed.double(), rtol=tolerance, atol=tolerance)
    wrong = int((~close).sum())
    return f"norm of {case.shape} {case.dtype}: {wrong} elements wrong" if wrong else ""


def _integers(rank: int, shape: Sequence[int]) -> Tensor:
    """int64 of -8..8, different on every rank; sums of 16 ranks are exact in any dtype."""
    size = torch.Size(shape)
    index = torch.arange(size.numel(), dtype=torch.int64)
    return ((index * 7 + rank * 13) % 17 - 8).view(size)


def _differences(got: Tensor, expected: Tensor, case: Case) -> str:
    found = got.cpu().flatten()
    wrong = (found != expected.flatten()).nonzero()
    if not len(wrong):
        return ""
    index = int(wrong[0])
    count = "x".join(map(str, case.shape))
    return (
        f"{case.op.name} of {count} {case.dtype}: {len(wrong)} elements wrong, first at {index}: "
        f"{found[index].item()} instead of {expected.flatten()[index].item()}"
    )
