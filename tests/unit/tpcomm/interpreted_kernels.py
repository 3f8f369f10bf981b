"""Runs the staging kernels under Triton's interpreter; started by test_staging_kernels.py.

Argument: world size.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tests.unit.tpcomm.cases import expected_reduction, make_input
from tests.unit.tpcomm.virtual_ranks import (
    SLOT_BYTES,
    clock_of_the_host,
    fresh_memory,
    interpreted_tables,
    run_virtual_ranks,
)
from tpcomm import ReduceOp
from tpcomm.allreduce_kernels import one_shot_all_reduce, two_shot_all_reduce, two_shot_bytes
from tpcomm.communicator import REDUCIBLE_DTYPES
from tpcomm.gather_kernel import small_all_gather
from tpcomm.norm_kernel import add_rms_norm, add_rms_norm_reference, all_reduce_add_rms_norm
from tpcomm.staging_tables import CHUNK_BYTES, StagingTables

EPS = 1e-5
MANY_RANKS = 5  # which take turns on few cores: fewer cases then


def check_reduce(
    tables: StagingTables, num_elements: int, dtype: torch.dtype, op: ReduceOp, two_shot: bool
) -> None:
    exact = dtype == torch.bfloat16  # the interpreter cuts to bfloat16 where a GPU rounds
    shape = (num_elements,)
    inputs = [make_input(r, shape, dtype, exact) for r in range(tables.world_size)]
    tensor = inputs[tables.rank].clone()
    call = two_shot_all_reduce if two_shot else one_shot_all_reduce
    assert call(tensor, op, tables) is tensor
    expected = expected_reduction(inputs, op)
    assert torch.equal(tensor, expected), (dtype, num_elements, op, two_shot)


def sweep_reductions(tables: StagingTables) -> None:
    """Every dtype and operation over sizes that use one, some and all chunks, whole or ragged."""
    for dtype in REDUCIBLE_DTYPES:
        wire_bytes = dtype.itemsize * (1 if dtype.is_floating_point else 2)
        most = SLOT_BYTES // wire_bytes
        sizes = (1, 333 // dtype.itemsize, most // 3 + 8, most)
        few = tables.world_size >= MANY_RANKS
        for num_elements in sizes[1::2] if few else sizes:
            for op in [ReduceOp.SUM] if few else ReduceOp:
                check_reduce(tables, num_elements, dtype, op, two_shot=False)
                fits = two_shot_bytes(torch.empty(num_elements, dtype=dtype), tables.world_size)
                if dtype.is_floating_point and fits <= SLOT_BYTES:
                    check_reduce(tables, num_elements, dtype, op, two_shot=True)
    unaligned = torch.ones(65)[1:]
    one_shot_all_reduce(unaligned, ReduceOp.SUM, tables)
    two_shot_all_reduce(unaligned, ReduceOp.SUM, tables)
    assert torch.equal(unaligned, torch.full((64,), float(tables.world_size) ** 2))


def words_of_all_ones(tables: StagingTables) -> None:
    """What a free word looks like can be sent too: NaNs stay NaN, integers stay what they are."""
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        for call in (one_shot_all_reduce, two_shot_all_reduce):
            nans = torch.full((40,), -1, dtype=bits).view(dtype)
            assert call(nans, ReduceOp.SUM, tables).isnan().all()
    for dtype in (torch.int32, torch.int64):
        ones = torch.full((40,), -1, dtype=dtype)
        one_shot_all_reduce(ones, ReduceOp.SUM, tables)
        assert torch.equal(ones, torch.full((40,), -tables.world_size, dtype=dtype))
    raw = torch.full((37,), 255, dtype=torch.uint8)
    out = torch.zeros(tables.world_size, 37, dtype=torch.uint8)
    assert torch.equal(small_all_gather(raw, out, tables), torch.full_like(out, 255))


def sweep_gathers(tables: StagingTables) -> None:
    for dtype in (torch.uint8, torch.bool, torch.int64, torch.bfloat16):
        for num_elements in (1, 5, 64, CHUNK_BYTES // dtype.itemsize + 16):
            inputs = [make_input(r, (num_elements,), dtype, True) for r in range(tables.world_size)]
            out = torch.empty(tables.world_size, num_elements, dtype=dtype)
            small_all_gather(inputs[tables.rank], out, tables)
            assert torch.equal(out, torch.stack(inputs)), (dtype, num_elements)


def sweep_norms(tables: StagingTables) -> None:
    """The fused kernel against the all-reduce and the kernel of one rank, bit for bit."""
    world_size = tables.world_size
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for rows, hidden in ((1, 64), (3, 100), (2, 256), (1, 1000)):
            shape = (rows, hidden)
            inputs = [make_input(r, shape, dtype, True) for r in range(world_size)]
            residual = make_input(99, shape, dtype, True)
            weight = make_input(98, (hidden,), dtype, False)
            fused_residual, plain_residual = residual.clone(), residual.clone()
            out = all_reduce_add_rms_norm(
                inputs[tables.rank].clone(), fused_residual, weight, EPS, tables
            )
            total = one_shot_all_reduce(inputs[tables.rank].clone(), ReduceOp.SUM, tables)
            plain = add_rms_norm(total, plain_residual, weight, EPS)
            assert torch.equal(out, plain) and torch.equal(fused_residual, plain_residual), shape
            expected = add_rms_norm_reference(
                expected_reduction(inputs, ReduceOp.SUM), residual, weight, EPS
            )
            assert torch.equal(fused_residual, residual), shape
            torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-3)


def mixed_calls(tables: StagingTables) -> None:
    """Kinds and sizes that follow each other at random, ranks late at random: no buffer is reused
    early, and all is wiped whatever was sent before."""
    common = torch.Generator().manual_seed(5)
    own = torch.Generator().manual_seed(tables.rank)
    for step in range(60 if tables.world_size < MANY_RANKS else 25):
        if torch.rand(1, generator=own) < 0.3:
            time.sleep(0.01)  # load for the test, not synchronisation
        kind, size = torch.randint(0, 4, (2,), generator=common).tolist()
        num_elements = (1, 40, 700, 1500)[size]
        value = torch.arange(num_elements, dtype=torch.float32) + step
        mine = value * (tables.rank + 1)
        factor = tables.world_size * (tables.world_size + 1) // 2
        if kind == 0:
            result, expected = one_shot_all_reduce(mine, ReduceOp.SUM, tables), value * factor
        elif kind == 1 and two_shot_bytes(mine, tables.world_size) <= SLOT_BYTES:
            result, expected = two_shot_all_reduce(mine, ReduceOp.SUM, tables), value * factor
        elif kind == 2:
            part = mine[:700]
            out = torch.empty(tables.world_size, len(part))
            result = small_all_gather(part, out, tables)
            expected = torch.stack([value[:700] * (r + 1) for r in range(tables.world_size)])
        else:
            result = torch.zeros(1, num_elements)
            weight = torch.ones(num_elements)
            all_reduce_add_rms_norm(mine[None], result, weight, EPS, tables)
            expected = (value * factor)[None]
        assert torch.equal(result, expected), (step, kind, num_elements)


def abort_frees_a_waiting_kernel() -> None:
    """No peer ever comes; the abort word, written from another thread, ends every wait."""
    tables = interpreted_tables(fresh_memory(2), 0, 2)
    x, out = torch.ones(1, 40), torch.ones(2, 40)
    calls: tuple[Callable[[], Tensor], ...] = (
        lambda: one_shot_all_reduce(torch.ones(5), ReduceOp.SUM, tables),
        lambda: one_shot_all_reduce(torch.ones(5, dtype=torch.int32), ReduceOp.SUM, tables),
        lambda: two_shot_all_reduce(torch.ones(50), ReduceOp.SUM, tables),
        lambda: small_all_gather(x[0], out, tables),
        lambda: all_reduce_add_rms_norm(x, torch.ones(1, 40), torch.ones(40), EPS, tables),
    )
    for call in calls:
        tables.abort_word.fill_(0)
        timer = threading.Timer(0.2, tables.abort_word.fill_, (1,))
        timer.start()
        call()
        assert int(tables.abort_word) == 1, "the kernel did not wait for its peer"
        timer.join(10)


def body(tables: StagingTables) -> None:
    sweep_reductions(tables)
    words_of_all_ones(tables)
    sweep_gathers(tables)
    sweep_norms(tables)
    mixed_calls(tables)


def main() -> None:
    run_virtual_ranks(body, int(sys.argv[1]))
    clock_of_the_host()
    abort_frees_a_waiting_kernel()


if __name__ == "__main__":
    main()
