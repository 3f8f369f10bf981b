"""Which way a collective of so many bytes takes: one table, the same on every rank."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

ALL_REDUCE = "all_reduce"
ALL_GATHER = "all_gather"
ADD_RMS_NORM = "all_reduce_add_rms_norm"
OPERATIONS = (ALL_REDUCE, ALL_GATHER, ADD_RMS_NORM)

ONE_SHOT = "one_shot"
TWO_SHOT = "two_shot"
NCCL = "nccl"
STAGED = "staged"  # the all-gather over staging memory
FUSED = "fused"
SEPARATE = "separate"  # an all-reduce, then the addition and the norm


@dataclass(frozen=True)
class Route:
    """Up to `max_bytes` of the input tensor, the operation goes by `path`."""

    operation: str
    max_bytes: int
    path: str


class SizeTable:
    """Routes by operation, each sorted by size; larger messages go by the `beyond` of a look-up."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes = tuple(
            sorted(routes, key=lambda r: (OPERATIONS.index(r.operation), r.max_bytes))
        )
        self._limits = {
            o: [r.max_bytes for r in self.routes if r.operation == o] for o in OPERATIONS
        }
        self._paths = {o: [r.path for r in self.routes if r.operation == o] for o in OPERATIONS}

    def path(self, operation: str, num_bytes: int, beyond: str) -> str:
        index = bisect.bisect_left(self._limits[operation], num_bytes)
        paths = self._paths[operation]
        return paths[index] if index < len(paths) else beyond

    def without(self, operation: str, path: str) -> SizeTable:
        """The table when a path is off: its sizes go to the next path, or beyond."""
        return SizeTable(
            [route for route in self.routes if (route.operation, route.path) != (operation, path)]
        )

    def describe(self) -> str:
        """One line: `all_reduce: one_shot to 524288, two_shot to 4194304; ...`."""
        parts = []
        for operation in OPERATIONS:
            steps = [f"{r.path} to {r.max_bytes}" for r in self.routes if r.operation == operation]
            parts.append(f"{operation}: {', '.join(steps) or 'nothing staged'}")
        return "; ".join(parts)


def unmeasured_table(world_size: int, limit_bytes: int) -> SizeTable:
    """What holds until the paths are measured.

    One-shot sends world_size - 1 times the message and two-shot less than twice, but in two steps
    of some 2 us: at 400 GB/s a rank they are equal near 256 KiB for four ranks. Two H100 were
    measured: equal at 1 MiB, and the fused norm ahead up to 512 KiB.
    """
    crossover = min((1 << 20) // (1 if world_size == 2 else world_size), limit_bytes)
    routes = [
        Route(ALL_REDUCE, crossover, ONE_SHOT),
        Route(ALL_REDUCE, limit_bytes, TWO_SHOT),
    ]
    fused = min(crossover, 512 << 10)
    routes.append(Route(ALL_GATHER, min(64 << 10, limit_bytes // 2), STAGED))
    routes.append(Route(ADD_RMS_NORM, min(fused, limit_bytes), FUSED))
    return SizeTable(routes)
