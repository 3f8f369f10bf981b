"""What is measured: each function runs on every rank and returns rows of plain values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from tpcomm import norm_kernel
from tpcomm.allreduce_kernels import Tile, one_shot_all_reduce, two_shot_all_reduce
from tpcomm.bench.halve_kernel import halve
from tpcomm.bench.measure import LIMIT_S, eager_microseconds, graph_microseconds
from tpcomm.bench.rank_pool import RankContext
from tpcomm.communicator import ReduceOp
from tpcomm.graph_timer import capture, wait_idle
from tpcomm.nccl import NcclCommunicator
from tpcomm.preflight import preflight
from tpcomm.staging import Staging

Row = dict[str, Any]
Call = Callable[[Tensor], Tensor]
_EPS = 1e-5
_CHECKED_CALLS = 7  # more than the buffers that alternate


def need_staging(context: RankContext) -> Staging:
    comm = context.join()
    if comm.staging is None:
        raise RuntimeError(f"staging is off: {comm.staging_absent}")
    return comm.staging


def all_reduce_call(context: RankContext, path: str) -> Call:
    """One way of an all-reduce, in place."""
    comm = context.join()
    if path == "nccl":
        return lambda tensor: NcclCommunicator.all_reduce(comm, tensor)
    staging = need_staging(context)
    if path == "one_shot":
        return lambda tensor: staging.one_shot(tensor, ReduceOp.SUM)
    return lambda tensor: staging.two_shot(tensor, ReduceOp.SUM)


def time_all_reduce(context: RankContext, path: str, num_bytes: int) -> Row:
    """Figures (i) and (ii) of one path and size in bf16, and whether its sums are exact.

    Empty where the path does not take the size.
    """
    comm = context.join()
    tensor = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=context.device)
    if path == "one_shot" and not need_staging(context).takes_one_shot(tensor):
        return {}
    call = all_reduce_call(context, path)
    correct = sums_are_exact(context, call, num_bytes // 2, torch.bfloat16)
    repeated = graph_microseconds(comm, lambda: call(tensor))

    def chained() -> None:
        call(tensor)
        halve(tensor)

    chain = graph_microseconds(comm, chained)
    kernel = graph_microseconds(comm, lambda: halve(tensor))
    eager = eager_microseconds(comm, lambda: call(tensor))
    return {
        "path": path,
        "bytes": num_bytes,
        "graph_us": repeated,
        "chain_us": chain,
        "kernel_us": kernel,
        "eager_us": eager,
        "correct": correct,
    }


def sums_are_exact(context: RankContext, call: Call, num_elements: int, dtype: torch.dtype) -> bool:
    """Integer-valued inputs, several calls in one graph, against sums computed on this rank."""
    steps = range(_CHECKED_CALLS)
    mine = [integers(context.rank, step, num_elements, dtype, context.device) for step in steps]
    work = [tensor.clone() for tensor in mine]

    def calls() -> None:
        for tensor in work:
            call(tensor)

    graph = capture(calls, 1, LIMIT_S)
    for tensor, fresh in zip(work, mine, strict=True):
        tensor.copy_(fresh)
    graph.replay()
    wait_idle(LIMIT_S, "the checked calls")
    for step, tensor in zip(steps, work, strict=True):
        expected = torch.zeros(num_elements, dtype=torch.float64, device=context.device)
        for peer in range(context.world_size):
            expected += integers(peer, step, num_elements, dtype, context.device)
        if not torch.equal(tensor.double(), expected):
            return False
    return True


def integers(
    rank: int, step: int, num_elements: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """-15..15, different by rank and step; sums of 8 ranks are exact in any dtype."""
    index = torch.arange(num_elements, device=device)
    return ((index + 3 * step + 5 * rank) % 31 - 15).to(dtype)


def time_fused(context: RankContext, num_rows: int, hidden_size: int) -> Row:
    """All-reduce + residual + norm as one kernel, as our two, and as NCCL and a kernel."""
    comm = context.join()
    staging = need_staging(context)
    shape = (num_rows, hidden_size)
    x, residual = (torch.zeros(shape, dtype=torch.bfloat16, device=context.device) for _ in "xr")
    weight = torch.ones(hidden_size, dtype=torch.bfloat16, device=context.device)

    def fused() -> Tensor:
        return staging.all_reduce_add_rms_norm(x, residual, weight, _EPS)

    def separate() -> Tensor:
        staging.one_shot(x, ReduceOp.SUM)
        return norm_kernel.add_rms_norm(x, residual, weight, _EPS)

    def by_nccl() -> Tensor:
        NcclCommunicator.all_reduce(comm, x)
        return norm_kernel.add_rms_norm(x, residual, weight, _EPS)

    row = {
        "bytes": x.nbytes,
        "rows": num_rows,
        "hidden": hidden_size,
        "correct": fused_is_separate(context, num_rows, hidden_size),
        "fused_us": graph_microseconds(comm, fused),
        "separate_us": graph_microseconds(comm, separate),
        "nccl_us": graph_microseconds(comm, by_nccl),
        "norm_us": graph_microseconds(
            comm, lambda: norm_kernel.add_rms_norm(x, residual, weight, _EPS)
        ),
    }
    row["gain"] = row["separate_us"] / row["fused_us"]
    return row


def fused_is_separate(context: RankContext, num_rows: int, hidden_size: int) -> bool:
    """The fused kernel and the two kernels give the same bits; the reference agrees closely."""
    staging = need_staging(context)
    generator = torch.Generator(context.device).manual_seed(7)  # alike on every rank
    for _ in range(_CHECKED_CALLS):
        shape = (context.world_size, num_rows, hidden_size)
        parts = torch.randn(shape, device=context.device, generator=generator).bfloat16()
        residual = torch.randn(shape[1:], device=context.device, generator=generator).bfloat16()
        weight = torch.randn(hidden_size, device=context.device, generator=generator).bfloat16()
        residuals = [residual.clone() for _ in range(3)]
        mine = parts[context.rank].clone()
        out = staging.all_reduce_add_rms_norm(mine, residuals[0], weight, _EPS)
        total = staging.one_shot(mine.clone(), ReduceOp.SUM)
        plain = norm_kernel.add_rms_norm(total, residuals[1], weight, _EPS)
        wait_idle(LIMIT_S, "the fused kernel")
        summed = parts.float()
        expected_sum = summed[0]
        for part in summed[1:]:
            expected_sum = expected_sum + part
        expected = norm_kernel.add_rms_norm_reference(
            expected_sum.bfloat16(), residuals[2], weight, _EPS
        )
        same = torch.equal(out, plain) and torch.equal(residuals[0], residuals[1])
        close = torch.allclose(out.float(), expected.float(), rtol=2e-2, atol=2e-2)
        if not (same and close and torch.equal(residuals[0], residuals[2])):
            return False
    return True


def time_all_gather(context: RankContext, num_rows: int, row_bytes: int) -> Row:
    """All-gather of `num_rows` x `row_bytes` bytes a rank."""
    comm = context.join()
    staging = need_staging(context)
    shape = (num_rows, row_bytes)
    source = torch.full(shape, context.rank + 1, dtype=torch.uint8, device=context.device)
    out = torch.zeros((context.world_size, *shape), dtype=torch.uint8, device=context.device)
    row = {
        "bytes": source.nbytes,
        "staged_us": graph_microseconds(comm, lambda: staging.all_gather(source, out)),
    }
    ranks = torch.arange(1, context.world_size + 1, device=context.device)
    row["correct"] = torch.equal(out.long(), ranks[:, None, None].expand(out.shape))
    row["nccl_us"] = graph_microseconds(
        comm, lambda: NcclCommunicator.all_gather(comm, source, out)
    )
    return row


def run_preflight(context: RankContext) -> Row:
    """What a group does at start-up: verdicts, times, and the table that follows."""
    comm = context.join()
    reports = [asdict(report) for report in preflight(comm, LIMIT_S)]
    return {"paths": reports, "table": comm.table.describe()}


def check_all_dtypes(context: RankContext) -> list[str]:
    """Every path, dtype and a spread of sizes, ragged ones too; what is wrong."""
    wrong = []
    # Integers take twice their size: what is largest here just fits an H100 as int64.
    sizes = (1, 7, 333, 1000, 4096, 70_001, 131_072)
    for path in ("one_shot", "two_shot"):
        call = all_reduce_call(context, path)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64):
            if path == "two_shot" and not dtype.is_floating_point:
                continue
            for num_elements in sizes:
                if not sums_are_exact(context, call, num_elements, dtype):
                    wrong.append(f"{path} {dtype} {num_elements}")
    for shape in ((1, 64), (5, 1000), (3, 4096), (64, 5120), (2, 8192)):
        if not fused_is_separate(context, *shape):
            wrong.append(f"fused {shape}")
    return wrong


TILES = (Tile(1024, 2), Tile(2048, 4), Tile(4096, 8), Tile(4096, 4), Tile(8192, 16), Tile(8192, 8))


def time_tiles(context: RankContext, path: str, num_bytes: int) -> list[Row]:
    """One path by other tiles than the default."""
    comm = context.join()
    tables = need_staging(context).tables
    tensor = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=context.device)
    reduce = one_shot_all_reduce if path == "one_shot" else two_shot_all_reduce
    rows = []
    for tile in TILES:
        if tables.fits(num_bytes // tile.num_bytes, tile.num_warps):
            call = functools.partial(reduce, tensor, ReduceOp.SUM, tables, tile)
            row = {"path": path, "bytes": num_bytes, "tile": tile.num_bytes}
            rows.append({**row, "warps": tile.num_warps, "us": graph_microseconds(comm, call)})
    return rows
