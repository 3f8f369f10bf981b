"""Which path for which size: each is timed as decoding uses it, and the fastest is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tpcomm.communicator import ReduceOp
from tpcomm.paths import CommPath
from tpcomm.size_table import ADD_RMS_NORM, ALL_GATHER, ALL_REDUCE, Route, SizeTable

_EPS = 1e-5
_WORTH_A_SWITCH = 0.97  # of the time of the path that the size below takes
_KIB = 1 << 10

Times = Mapping[tuple[str, str], Mapping[int, float]]  # (operation, path) -> bytes -> us


def sizes_of(operation: str, max_bytes: int, row_bytes: int) -> list[int]:
    """Input sizes that are timed, rising; for the fused norm whole rows of `row_bytes`."""
    if operation == ALL_GATHER:
        sizes = [512, 4 * _KIB, 32 * _KIB]
    elif operation == ADD_RMS_NORM:
        sizes = [row_bytes << step for step in range(8)]
    else:
        sizes = [8 * _KIB << step for step in range(10)]
    fitting = [size for size in sizes if size <= max_bytes]
    return fitting


def timed_call(
    path: CommPath, num_bytes: int, row_bytes: int, dtype: torch.dtype
) -> tuple[Callable[[], object], tuple[object, ...]]:
    """A call of the path on zeros, always the same, and what it is called with."""
    assert path.call is not None
    call = path.call

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=path.device)

    arguments: tuple[object, ...]
    if path.operation == ADD_RMS_NORM:
        width = row_bytes // dtype.itemsize
        rows = num_bytes // row_bytes
        arguments = (zeros(rows, width), zeros(rows, width), zeros(width), _EPS)
    elif path.operation == ALL_GATHER:
        arguments = (zeros(num_bytes // dtype.itemsize),)
    else:
        arguments = (zeros(num_bytes // dtype.itemsize), ReduceOp.SUM)
    return (lambda: call(*arguments)), arguments


def build_table(times: Times) -> SizeTable:
    """The fastest path of every measured size serves the sizes up to it, from the next below on.

    A path takes over from the one before only if it is clearly faster. What is above all sizes
    goes by the operation's own way, which no route names.
    """
    routes: list[Route] = []
    for operation in (ALL_REDUCE, ALL_GATHER, ADD_RMS_NORM):
        by_path = {name: of for (op, name), of in times.items() if op == operation}
        routes += _routes(operation, by_path)
    return SizeTable(routes)


def _routes(operation: str, by_path: Mapping[str, Mapping[int, float]]) -> Sequence[Route]:
    routes: list[Route] = []
    for size in sorted({size for of in by_path.values() for size in of}):
        now = {name: of.get(size, math.inf) for name, of in by_path.items()}
        best = min(now, key=lambda name: now[name])
        if routes and now[best] > _WORTH_A_SWITCH * now[routes[-1].path]:
            best = routes[-1].path
        if not math.isfinite(now[best]):
            continue
        if routes and routes[-1].path == best:
            routes.pop()
        routes.append(Route(operation, size, best))
    return routes
