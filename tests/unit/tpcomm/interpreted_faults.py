"""Breaks the protocol of staging_tables on purpose, and asserts that the sums show it.

Argument: `unwiped` (no buffer is set back to ones) or `early_reuse` (one buffer instead of three).
Started by test_staging_kernels.py.
"""

from __future__ import annotations

import sys
import time

import torch

from tests.unit.tpcomm.virtual_ranks import run_virtual_ranks
from tpcomm import ReduceOp
from tpcomm.allreduce_kernels import one_shot_all_reduce
from tpcomm.staging_tables import StagingTables

NUM_CALLS = 8


def wrong_sums(tables: StagingTables, fault: str) -> int:
    """How many sums this rank sees wrong; rank 1 is late, so that rank 0 reads what is stale."""
    wrong = 0
    for step in range(NUM_CALLS):
        time.sleep(0.1 * tables.rank)
        value = torch.full((16,), float(step * tables.world_size + tables.rank))
        expected = float(sum(step * tables.world_size + r for r in range(tables.world_size)))
        one_shot_all_reduce(value, ReduceOp.SUM, tables)
        wrong += int(value[0] != expected)
        if fault == "unwiped":
            tables.state.copy_(tables.state >> 32 << 32)
        elif fault == "early_reuse":
            tables.state.copy_(tables.state & 0xFFFFFFFF)
    return wrong


def main() -> None:
    fault = sys.argv[1]

    def body(tables: StagingTables) -> None:
        wrong = wrong_sums(tables, fault)
        assert wrong or tables.rank, f"{fault} was not noticed"

    def sound(tables: StagingTables) -> None:
        assert wrong_sums(tables, "") == 0

    run_virtual_ranks(sound, 2)
    run_virtual_ranks(body, 2)


if __name__ == "__main__":
    main()
