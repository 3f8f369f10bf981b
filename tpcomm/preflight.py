"""Every path checked before it is trusted.

Inputs are small integers, so that any order of summation gives the same bits, and the sums are
computed on the host. A path that is wrong, or hangs, on one rank is reported as unusable and
switched off on all ranks: the verdict is agreed over the last path, which is the backend's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpcomm.communicator import REDUCIBLE_DTYPES, Communicator, ReduceOp
from tpcomm.errors import CommError, CommTimeout
from tpcomm.paths import CommPath, HasPaths

_LARGE_BYTES = 1 << 20
_REPEATS = 2  # paths alternate between two buffers


@dataclass(frozen=True)
class PathReport:
    """Verdict on one path, the same `usable` on every rank; `detail` says what was done or why not.

    `detail` of an unusable path names the cause on the rank that saw it.
    """

    path: str
    usable: bool
    detail: str


@dataclass(frozen=True)
class _Case:
    num_elements: int
    dtype: torch.dtype
    op: ReduceOp


def preflight(comm: Communicator, timeout_s: float) -> list[PathReport]:
    """Check every path of `comm`; collective. Compiles what the paths need first.

    `timeout_s` bounds each check. Paths that the group could not make are reported as unusable
    with the reason. Nothing is raised for a path that fails; a caller that needs it looks.
    """
    if not isinstance(comm, HasPaths):
        raise CommError(f"{type(comm).__name__} names no paths that could be checked")
    return check_paths(comm, comm.paths(), timeout_s)


def check_paths(comm: HasPaths, paths: Sequence[CommPath], timeout_s: float) -> list[PathReport]:
    """`preflight` over the given paths; the last one carries the verdicts."""
    base = paths[-1]
    reports = {base.name: _check_and_agree(comm, base, base, timeout_s)}
    for path in paths[:-1]:
        if reports[base.name].usable:
            reports[path.name] = _check_and_agree(comm, path, base, timeout_s)
        else:
            reports[path.name] = PathReport(path.name, False, f"{base.name} does not work")
    return [reports[path.name] for path in paths]


def _check_and_agree(
    comm: HasPaths, path: CommPath, base: CommPath, timeout_s: float
) -> PathReport:
    if path.absent:
        return PathReport(path.name, False, path.absent)
    cases = _cases(path)
    reason = _check(comm, path, cases, timeout_s)
    reason = _agree(base, reason, timeout_s)
    if not reason:
        largest = max(case.num_elements * case.dtype.itemsize for case in cases)
        return PathReport(path.name, True, f"{len(cases)} cases bit for bit, up to {largest} bytes")
    if path.switch_off is not None:
        path.switch_off(reason)
    return PathReport(path.name, False, reason)


def _cases(path: CommPath) -> list[_Case]:
    """Every dtype, with and without whole vectors; one maximum; the largest message."""
    cases = [
        _Case(num_elements, dtype, ReduceOp.SUM)
        for dtype in REDUCIBLE_DTYPES
        for num_elements in (1, 333, 4096)
    ]
    large = (path.max_bytes or _LARGE_BYTES) // torch.bfloat16.itemsize
    cases.append(_Case(4096, torch.float32, ReduceOp.MAX))
    cases.append(_Case(large, torch.bfloat16, ReduceOp.SUM))
    return cases


def _check(comm: HasPaths, path: CommPath, cases: Sequence[_Case], timeout_s: float) -> str:
    """Why the path cannot be trusted, as this rank sees it; empty if it can."""
    assert path.all_reduce is not None
    try:
        for case in cases:
            if path.prepare is not None:
                path.prepare(_input(comm.rank, case).to(path.device), case.op)
        for case in cases:
            expected = _expected(comm.world_size, case)
            for _ in range(_REPEATS):
                tensor = _input(comm.rank, case).to(path.device)
                path.all_reduce(tensor, case.op)
                if path.wait is not None:
                    path.wait(timeout_s)
                mistake = _compare(tensor.cpu(), expected, case)
                if mistake:
                    return mistake
    except CommTimeout as error:
        return _rescue(path, timeout_s, str(error))
    except CommError as error:
        return str(error)
    return ""


def _rescue(path: CommPath, timeout_s: float, reason: str) -> str:
    if path.rescue is None:
        return reason
    try:
        path.rescue(timeout_s)
    except CommTimeout as error:
        return f"{reason}; {error}"
    return reason


def _agree(base: CommPath, reason: str, timeout_s: float) -> str:
    """This rank's reason, or that another rank has one."""
    assert base.all_reduce is not None
    failed = torch.tensor([int(bool(reason))], dtype=torch.int32, device=base.device)
    try:
        base.all_reduce(failed, ReduceOp.MAX)
        if base.wait is not None:
            base.wait(3 * timeout_s)  # a rank that hung comes after its limit and its rescue
    except CommError as error:
        return reason or f"no agreement over {base.name}: {error}"
    return reason or ("another rank found it wrong" if failed.item() else "")


def _input(rank: int, case: _Case) -> Tensor:
    """Integers of -8..8, different on every rank; sums of 16 ranks are exact in any dtype."""
    index = torch.arange(case.num_elements, dtype=torch.int64)
    return ((index * 7 + rank * 13) % 17 - 8).to(case.dtype)


def _expected(world_size: int, case: _Case) -> Tensor:
    wide = _Case(case.num_elements, torch.int64, case.op)
    parts = [_input(rank, wide) for rank in range(world_size)]
    total = parts[0]
    for part in parts[1:]:
        total = torch.maximum(total, part) if case.op == ReduceOp.MAX else total + part
    return total.to(case.dtype)


def _compare(got: Tensor, expected: Tensor, case: _Case) -> str:
    wrong = (got != expected).nonzero()
    if not len(wrong):
        return ""
    index = int(wrong[0])
    return (
        f"{case.op.name} of {case.num_elements} {case.dtype}: {len(wrong)} elements wrong, first "
        f"at {index}: {got[index].item()} instead of {expected[index].item()}"
    )
