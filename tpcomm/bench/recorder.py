"""What the flight recorder costs: the same calls with recording on and off, in one run."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

import torch

from tpcomm.allreduce_kernels import one_shot_all_reduce, two_shot_all_reduce
from tpcomm.bench.cases import Row, need_staging
from tpcomm.bench.measure import graph_microseconds
from tpcomm.bench.rank_pool import RankContext
from tpcomm.communicator import ReduceOp
from tpcomm.nccl import NcclCommunicator
from tpcomm.norm_kernel import all_reduce_add_rms_norm

PATHS = ("one_shot", "two_shot", "fused", "nccl")
_ROUNDS = 3  # of both, by turns
_HIDDEN = 4096
_EPS = 1e-5


def time_recorder(context: RankContext, path: str, num_bytes: int) -> Row:
    """One path and size in bf16, recorded and not; `fused` by rows of 4,096."""
    comm = context.join()
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(_ROUNDS):
        for is_recording, measured in times.items():
            comm.is_recording = is_recording
            call = _call(context, path, num_bytes, is_recording)
            measured.append(graph_microseconds(comm, call))
    comm.is_recording = True
    on_us, off_us = (statistics.median(times[key]) for key in (True, False))
    return {"path": path, "bytes": num_bytes, "on_us": on_us, "off_us": off_us}


def _call(
    context: RankContext, path: str, num_bytes: int, is_recording: bool
) -> Callable[[], object]:
    comm = context.join()
    tables = dataclasses.replace(need_staging(context).tables, is_recording=is_recording)
    x = torch.zeros((num_bytes // 2 // _HIDDEN, _HIDDEN), device=context.device).bfloat16()
    if path == "one_shot":
        return lambda: one_shot_all_reduce(x, ReduceOp.SUM, tables)
    if path == "two_shot":
        return lambda: two_shot_all_reduce(x, ReduceOp.SUM, tables)
    if path == "nccl":
        return lambda: NcclCommunicator.all_reduce(comm, x)
    residual, weight = torch.zeros_like(x), torch.ones_like(x[0])
    return lambda: all_reduce_add_rms_norm(x, residual, weight, _EPS, tables)
