"""Every path checked before it is trusted, and timed before it is chosen.

A path that is wrong, or hangs, on one rank is reported as unusable and switched off on all ranks.
Where there is a choice, each path is then timed per size inside a graph, and the fastest are taken.
Verdicts and times are agreed over the last path, which is the backend's own, so that every rank
has the same table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch

from tpcomm.communicator import Communicator, ReduceOp
from tpcomm.errors import CommError, CommTimeout
from tpcomm.path_checks import cases_of, find_mistake, make_arguments
from tpcomm.path_times import build_table, sizes_of, timed_call
from tpcomm.paths import CommPath, HasPaths, HasTable

_BESIDE = "a path over the same memory hung"
_REPEATS = 4  # more than the buffers that a path alternates between


@dataclass(frozen=True)
class PathReport:
    """Verdict on one path, the same `usable` on every rank; `detail` says what was done or why not.

    `detail` of an unusable path names the cause on the rank that saw it. `hung`: a call of it did
    not end on some rank, after which what shares its memory is not used. `times` are (bytes,
    microseconds) of the slowest rank inside a graph, the same on every rank; none where the
    backend has one way only.
    """

    path: str
    usable: bool
    detail: str
    operation: str = "all_reduce"
    times: tuple[tuple[int, float], ...] = ()
    hung: bool = False


class _Verdict(IntEnum):
    SOUND = 0
    WRONG = 1
    HUNG = 2


@dataclass(frozen=True)
class _Finding:
    verdict: _Verdict
    reason: str = ""


def preflight(
    comm: Communicator,
    timeout_s: float,
    hidden_size: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
) -> list[PathReport]:
    """Check and time every path of `comm`; collective. Compiles what the paths need first.

    `timeout_s` bounds each check and each measurement; those of the fused norm are of rows
    [hidden_size], all of `dtype`. A communicator that has a choice takes the paths that were
    fastest from then on. Paths that the group could not make are reported as unusable with the
    reason. Nothing is raised for a path that fails; a caller that needs it looks.
    """
    if not isinstance(comm, HasPaths):
        raise CommError(f"{type(comm).__name__} names no paths that could be checked")
    paths = comm.paths()
    reports = check_paths(comm, paths, timeout_s)
    if isinstance(comm, HasTable):
        row_bytes = hidden_size * dtype.itemsize
        reports = time_paths(paths, reports, timeout_s, row_bytes, dtype)
        times = {(r.operation, r.path): dict(r.times) for r in reports if r.usable}
        comm.table = build_table(times)
    return reports


def check_paths(comm: HasPaths, paths: Sequence[CommPath], timeout_s: float) -> list[PathReport]:
    """The checks of `preflight` over the given paths; the last one carries the verdicts."""
    base = paths[-1]
    base_report = _report(base, base, _check(comm, base, timeout_s), timeout_s)
    reports: list[PathReport] = []
    for path in paths[:-1]:
        if path.absent:
            reports.append(PathReport(path.name, False, path.absent, path.operation))
        elif not base_report.usable:
            reason = f"{base.name} does not work"
            reports.append(PathReport(path.name, False, reason, path.operation))
        elif path.rescue is not None and any(report.hung for report in reports):
            reports.append(PathReport(path.name, False, _BESIDE, path.operation))
        else:
            reports.append(_report(path, base, _check(comm, path, timeout_s), timeout_s))
    return [*reports, base_report]


def time_paths(
    paths: Sequence[CommPath],
    reports: Sequence[PathReport],
    timeout_s: float,
    row_bytes: int,
    dtype: torch.dtype,
) -> list[PathReport]:
    """`reports` with times of the usable paths; a path that fails now is switched off too."""
    base, timed = paths[-1], list(reports)
    for index, (path, report) in enumerate(zip(paths, reports, strict=True)):
        if not report.usable or path.measure is None:
            continue
        if path.rescue is not None and any(other.hung for other in timed):
            timed[index] = replace(report, usable=False, detail=_BESIDE)
            continue
        sizes = sizes_of(path.operation, path.max_bytes or 1 << 62, row_bytes)
        times = [math.inf] * len(sizes)
        finding = _time(path, sizes, times, timeout_s, row_bytes, dtype)
        outcome = _report(path, base, finding, timeout_s)
        if outcome.usable:
            slowest = _largest(base, times, timeout_s)
            timed[index] = replace(report, times=tuple(zip(sizes, slowest, strict=True)))
        else:
            timed[index] = outcome
    return timed


def _report(path: CommPath, base: CommPath, own: _Finding, timeout_s: float) -> PathReport:
    """The verdict of all ranks, whose worst one counts; a path that is not sound is off then."""
    finding = _agree(base, own, timeout_s)
    if finding.verdict == _Verdict.SOUND:
        cases = cases_of(path)
        largest = max(case.num_bytes for case in cases)
        detail = f"{len(cases)} cases bit for bit, up to {largest} bytes"
        return PathReport(path.name, True, detail, path.operation)
    hung = finding.verdict == _Verdict.HUNG
    if path.switch_off is not None:
        path.switch_off(finding.reason, hung)
    return PathReport(path.name, False, finding.reason, path.operation, hung=hung)


def _check(comm: HasPaths, path: CommPath, timeout_s: float) -> _Finding:
    """Why the path cannot be trusted, as this rank sees it."""
    assert path.call is not None
    cases, mistake = cases_of(path), ""
    try:
        for case in cases:
            if path.prepare is not None:
                path.prepare(*make_arguments(path, case, comm.rank))
        for case in cases:
            for _ in range(_REPEATS):
                arguments = make_arguments(path, case, comm.rank)
                result = path.call(*arguments)
                if path.wait is not None:
                    path.wait(timeout_s)
                # Go on after a mistake: the other ranks may have seen none, and call on.
                mistake = mistake or find_mistake(path, case, arguments, result, comm.world_size)
    except CommTimeout as error:
        return _Finding(_Verdict.HUNG, _rescue(path, timeout_s, str(error)))
    except CommError as error:
        return _Finding(_Verdict.WRONG, mistake or str(error))
    return _Finding(_Verdict.WRONG if mistake else _Verdict.SOUND, mistake)


def _time(
    path: CommPath,
    sizes: Sequence[int],
    times: list[float],
    timeout_s: float,
    row_bytes: int,
    dtype: torch.dtype,
) -> _Finding:
    """Fill in `times` of `sizes`, as this rank sees them."""
    assert path.measure is not None
    try:
        for index, size in enumerate(sizes):
            call, arguments = timed_call(path, size, row_bytes, dtype)
            if path.prepare is not None:
                path.prepare(*arguments)
            times[index] = path.measure(call, timeout_s)
    except CommTimeout as error:
        return _Finding(_Verdict.HUNG, _rescue(path, timeout_s, str(error)))
    except CommError as error:
        return _Finding(_Verdict.WRONG, str(error))
    return _Finding(_Verdict.SOUND)


def _rescue(path: CommPath, timeout_s: float, reason: str) -> str:
    if path.rescue is None:
        return reason
    try:
        path.rescue(timeout_s)
    except CommTimeout as error:
        return f"{reason}; {error}"
    return reason


def _agree(base: CommPath, own: _Finding, timeout_s: float) -> _Finding:
    """The worst verdict of all ranks, with this rank's reason, or that another rank has one."""
    try:
        worst = _Verdict(int(_largest(base, [float(own.verdict)], 3 * timeout_s)[0]))
    except CommError as error:  # a rank that hung comes after its limit and its rescue
        reason = own.reason or f"no agreement over {base.name}: {error}"
        return _Finding(max(own.verdict, _Verdict.WRONG), reason)
    elsewhere = "" if worst == _Verdict.SOUND else "another rank found it wrong"
    return _Finding(worst, own.reason or elsewhere)


def _largest(base: CommPath, values: Sequence[float], timeout_s: float) -> list[float]:
    """Of each value over all ranks, which get the same bits."""
    assert base.call is not None
    tensor = torch.tensor(values, dtype=torch.float32, device=base.device)
    base.call(tensor, ReduceOp.MAX)
    if base.wait is not None:
        base.wait(timeout_s)
    return [float(value) for value in tensor.cpu()]
