"""A survivor whose captured graph goes on with a new peer; run on ranks of a RankPool."""

from __future__ import annotations

import os
import signal
import threading
import time

import torch
from torch import Tensor

from tpcomm import create_communicator
from tpcomm.bench.rank_pool import RankContext
from tpcomm.communicator import ReduceOp
from tpcomm.graph_timer import capture, wait_idle
from tpcomm.group_id import parse_group_id
from tpcomm.staged import StagedCommunicator

LIMIT_S = 30.0
JOIN_S = 90.0  # the survivor comes only after it has lost its first peer
ABORT_LIMIT_S = 2.0
NUM_ELEMENTS = 4096
STAGING_BYTES = 1 << 20


def _graph(comm: StagedCommunicator, tensor: Tensor) -> torch.cuda.CUDAGraph:
    staging = comm.staging
    assert staging is not None, comm.staging_absent
    return capture(lambda: staging.one_shot(tensor, ReduceOp.SUM), 1, LIMIT_S)


def _replay(graph: torch.cuda.CUDAGraph, tensor: Tensor, num_replays: int) -> bool:
    """Whether sums of fives are right every time."""
    right = True
    for _ in range(num_replays):
        tensor.fill_(5.0)
        graph.replay()
        wait_idle(LIMIT_S, "a replay")
        right = right and bool((tensor == 10.0).all())
    return right


def survive(context: RankContext, second_id: bytes) -> dict[str, float | bool]:
    """Rank 0: its peer is killed in mid-replay; the graph captured before goes on afterwards."""
    comm = context.join()
    tensor = torch.zeros(NUM_ELEMENTS, device=context.device)
    weights = torch.arange(1 << 20, device=context.device)
    graph = _graph(comm, tensor)
    if context.rank == 1:
        _replay(graph, tensor, 5)
        os.kill(os.getpid(), signal.SIGKILL)
    before = _replay(graph, tensor, 5)
    graph.replay()  # the peer is gone: this one waits for ever
    stuck = torch.cuda.current_stream().record_event()
    time.sleep(0.5)
    was_stuck = not stuck.query()
    begun = time.monotonic()
    threading.Thread(target=comm.abort).start()
    wait_idle(LIMIT_S, "the aborted replay")
    freed_s = time.monotonic() - begun
    group = parse_group_id(second_id, "nccl")
    comm.rejoin(bytes.fromhex(group.nccl_id), group.name)
    again = _replay(graph, tensor, 50)
    intact = torch.equal(weights, torch.arange(1 << 20, device=context.device))
    return {
        "before": before,
        "was_stuck": was_stuck,
        "freed_s": freed_s,
        "again": again,
        "intact": intact,
    }


def replace(context: RankContext, second_id: bytes) -> bool:
    """A new process in the place of rank 1, on its GPU."""
    device = torch.device("cuda", 1)
    torch.cuda.set_device(device)
    comm = create_communicator("nccl", second_id, 1, 2, device, JOIN_S, STAGING_BYTES)
    assert isinstance(comm, StagedCommunicator)
    tensor = torch.zeros(NUM_ELEMENTS, device=device)
    staging = comm.staging
    assert staging is not None, comm.staging_absent
    right = True
    for _ in range(50):
        tensor.fill_(5.0)
        staging.one_shot(tensor, ReduceOp.SUM)
        wait_idle(LIMIT_S, "a call of the newcomer")
        right = right and bool((tensor == 10.0).all())
    return right
