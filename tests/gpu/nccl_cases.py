"""What the ranks do in the GPU tests of tpcomm: each function runs on every rank of a pool."""

from __future__ import annotations

import threading
import time

import torch
from torch import Tensor

from tests.unit.tpcomm.rank_pool import Rank
from tpcomm import CommAborted, CommError, PathReport, preflight

ABORT_LIMIT_S = 20.0


def check_paths(rank: Rank, backend: str, group_id: bytes) -> list[PathReport]:
    return preflight(rank.shared(backend, group_id), 30.0)


def _integers(rank: int, step: int, num_elements: int, device: torch.device) -> Tensor:
    index = torch.arange(num_elements, device=device)
    return ((index + 3 * step + 5 * rank) % 31 - 15).to(torch.bfloat16)


def replay_graph(
    rank: Rank, backend: str, group_id: bytes, num_elements: int, num_replays: int
) -> None:
    """A chain of three all-reduces in one graph, replayed with fresh inputs and ranks out of step.

    All sums are exact in bfloat16: small integers, then times the world size, a power of two.
    """
    comm = rank.shared(backend, group_id)
    tensor = torch.zeros(num_elements, dtype=torch.bfloat16, device=rank.device)
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        comm.all_reduce(tensor)
        comm.barrier(30.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(3):
                comm.all_reduce(tensor)
        for step in range(num_replays):
            if step % rank.world_size == rank.rank:
                torch.cuda._sleep(200_000)  # type: ignore[no-untyped-call]
            tensor.copy_(_integers(rank.rank, step, num_elements, rank.device))
            graph.replay()
            total = _integers(0, step, num_elements, rank.device).float()
            for peer in range(1, rank.world_size):
                total += _integers(peer, step, num_elements, rank.device).float()
            assert torch.equal(tensor.float(), total * rank.world_size**2), step
    comm.barrier(30.0)
    del graph


def abort_frees_the_stream(rank: Rank, backend: str, group_id: bytes, num_elements: int) -> str:
    """The last rank stays away. An abort ends the kernel that waits; memory stays intact."""
    comm = rank.join(backend, group_id, 30.0)
    weights = torch.arange(1000, device=rank.device)
    torch.cuda.synchronize()
    if rank.rank == rank.world_size - 1:
        rank.communicators[group_id] = comm
        return "absent"
    comm.all_reduce(torch.ones(num_elements, device=rank.device))
    done = torch.cuda.current_stream().record_event()
    time.sleep(0.2)  # the kernel has had the time to end, had it not waited
    if done.query():
        return "did not wait for the absent rank"
    timer = threading.Timer(0.1, comm.abort)
    timer.start()
    deadline = time.monotonic() + ABORT_LIMIT_S
    while not done.query():
        if time.monotonic() > deadline:
            return "still stuck"
        time.sleep(0.001)
    timer.join(10)
    try:
        comm.all_reduce(torch.ones(3, device=rank.device))
    except CommAborted:
        intact = torch.equal(weights, torch.arange(1000, device=rank.device))
        return "freed" if intact else "freed, memory changed"
    except CommError as error:
        return str(error)
    return "freed, still usable"
