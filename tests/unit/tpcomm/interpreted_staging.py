"""The staging path between processes on host memory, under Triton's interpreter.

One process is lost and replaced. Started by test_staging.py. Buffers are made, exported, exchanged
and mapped as on GPUs; what torch needs of CUDA is replaced by nothing.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from typing import cast

import torch
from torch import Tensor

from tests.unit.tpcomm.cases import expected_reduction, make_input
from tests.unit.tpcomm.host_driver import HostDriver, tensor_at
from tests.unit.tpcomm.virtual_ranks import clock_of_the_host
from tpcomm import ReduceOp, staging
from tpcomm.cuda_driver import CudaDriver
from tpcomm.group_id import new_name
from tpcomm.staging import Staging
from tpcomm.staging_tables import CHUNK_BYTES

WORLD_SIZE = 2
STAGING_BYTES = 4 * CHUNK_BYTES
HOST = torch.device("cpu", 0)


def without_cuda() -> None:
    clock_of_the_host()

    def nothing(*arguments: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def same(tensor: Tensor) -> Tensor:
        return tensor

    replaced: list[tuple[object, str, object]] = [
        (torch.cuda, name, nothing) for name in ("Stream", "stream", "device", "synchronize")
    ]
    replaced += [(Tensor, "pin_memory", same), (staging, "tensor_at", tensor_at)]
    for owner, name, value in replaced:
        setattr(owner, name, value)


def run_rank(name: str, rank: int) -> None:
    without_cuda()
    driver = cast(CudaDriver, HostDriver())
    buffers = Staging(rank, WORLD_SIZE, HOST, STAGING_BYTES + 5, driver)
    assert buffers.limit_bytes == STAGING_BYTES
    buffers.connect(name, 20.0)
    assert len(set(buffers.tables.bases.tolist())) == WORLD_SIZE
    for num_elements in (1, 1500, STAGING_BYTES // 4, 333, 1500):
        inputs = [make_input(r, (num_elements,), torch.float32, False) for r in range(WORLD_SIZE)]
        expected = expected_reduction(inputs, ReduceOp.SUM)
        for call in (buffers.one_shot, buffers.two_shot):
            assert torch.equal(call(inputs[rank].clone(), ReduceOp.SUM), expected), num_elements
    out = torch.empty(WORLD_SIZE, 333)
    assert torch.equal(buffers.all_gather(inputs[rank][:333], out)[1], inputs[1][:333])
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    # Rank 1 is gone: without the abort word this would not return.
    buffers.abort()
    buffers.one_shot(torch.ones(8), ReduceOp.SUM)
    rejoin(buffers, new_name_of(name))
    buffers.close()


def new_name_of(name: str) -> str:
    return f"{name}-again"


def rejoin(buffers: Staging, name: str) -> None:
    """Both the survivor and the newcomer: the same addresses, and sums are right again."""
    tables = buffers.tables
    held = [part.data_ptr() for part in (tables.bases, tables.state, tables.abort_word)]
    buffers.connect(name, 20.0)
    assert held == [part.data_ptr() for part in (tables.bases, tables.state, tables.abort_word)]
    for num_elements in (5, 1500, 5):
        inputs = [make_input(r, (num_elements,), torch.float32, False) for r in range(WORLD_SIZE)]
        tensor = inputs[tables.rank].clone()
        expected = expected_reduction(inputs, ReduceOp.SUM)
        assert torch.equal(buffers.one_shot(tensor, ReduceOp.SUM), expected)


def run_newcomer(name: str) -> None:
    """Takes the place of rank 1."""
    without_cuda()
    driver = cast(CudaDriver, HostDriver())
    buffers = Staging(1, WORLD_SIZE, HOST, STAGING_BYTES, driver)
    rejoin(buffers, new_name_of(name))
    buffers.close()


def main() -> None:
    name = new_name()
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(name, rank)) for rank in range(WORLD_SIZE)]
    ranks.append(context.Process(target=run_newcomer, args=(name,)))
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    sys.exit(f"exit codes {codes}" if codes != [0, -signal.SIGKILL, 0] else 0)


if __name__ == "__main__":
    main()
