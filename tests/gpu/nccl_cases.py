"""What the ranks do in the GPU tests of tpcomm: each function runs on every rank of a pool."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.unit.tpcomm.rank_pool import Rank
from tpcomm import CollectiveRecord, CommAborted, CommError, PathReport, ReduceOp, preflight
from tpcomm.bench import stress
from tpcomm.bench.cases import check_all_dtypes
from tpcomm.bench.rank_pool import RankContext
from tpcomm.graph_timer import capture
from tpcomm.staged import StagedCommunicator

ABORT_LIMIT_S = 20.0
FAULT_LIMIT_S = 5.0


def check_paths(rank: Rank, backend: str, group_id: bytes) -> tuple[list[PathReport], str]:
    comm = rank.shared(backend, group_id)
    reports = preflight(comm, 30.0)
    assert isinstance(comm, StagedCommunicator)
    return reports, comm.table.describe()


def planted_fault(
    rank: Rank, backend: str, group_id: bytes, fault: str
) -> tuple[list[PathReport], float]:
    """Rank 1's one-shot flips a byte, or is not issued; the verdicts, and how long they took."""
    comm = rank.join(backend, group_id, 30.0)
    assert isinstance(comm, StagedCommunicator) and comm.staging is not None
    one_shot = comm.staging.one_shot

    def broken(tensor: Tensor, op: ReduceOp) -> Tensor:
        if fault == "hang":
            return tensor
        one_shot(tensor, op)
        if tensor.numel() == 333:
            tensor.view(torch.uint8)[8] ^= 1
        return tensor

    if rank.rank == 1:
        setattr(comm.staging, "one_shot", broken)  # noqa: B010
    begun = time.monotonic()
    reports = preflight(comm, FAULT_LIMIT_S)
    took = time.monotonic() - begun
    value = torch.ones(4096, device=rank.device)
    comm.all_reduce(value)  # by whatever is left
    assert value[0].item() == rank.world_size
    rank.communicators[group_id] = comm
    return reports, took


def several_groups(rank: Rank, backend: str, first: bytes, second: bytes) -> None:
    """Two communicators of one process, used in turn, do not disturb each other."""
    comms = [rank.shared(backend, first), rank.shared(backend, second)]
    for step in range(20):
        values = [torch.full((1000,), float(step + k), device=rank.device) for k in range(2)]
        for comm, value in zip(comms, values, strict=True):
            comm.all_reduce(value)
        for k, value in enumerate(values):
            assert value[7].item() == rank.world_size * (step + k)


def mixed_kernels(rank: Rank, backend: str, group_id: bytes, num_replays: int) -> int:
    """All kernels in one graph, with late ranks and random inputs; elements that were wrong."""
    comm = rank.shared(backend, group_id)
    assert isinstance(comm, StagedCommunicator)
    context = RankContext(rank.rank, rank.world_size, rank.device, group_id, 0, comm)
    return int(stress.replay_with_late_ranks(context, num_replays)["wrong"])


def every_dtype_and_size(rank: Rank, backend: str, group_id: bytes) -> list[str]:
    comm = rank.shared(backend, group_id)
    assert isinstance(comm, StagedCommunicator)
    return check_all_dtypes(RankContext(rank.rank, rank.world_size, rank.device, group_id, 0, comm))


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


def records_of_a_stuck_replay(
    rank: Rank, backend: str, group_id: bytes, num_elements: int
) -> tuple[Sequence[CollectiveRecord], int, bool]:
    """The last rank does not replay: records read meanwhile, when, and whether an abort freed."""
    comm = rank.join(backend, group_id, 30.0)
    tensor = torch.zeros(num_elements, dtype=torch.bfloat16, device=rank.device)
    graph = capture(lambda: comm.all_reduce(tensor), 2, ABORT_LIMIT_S)
    for _ in range(3):
        graph.replay()
    comm.barrier(30.0)
    if rank.rank == rank.world_size - 1:
        rank.communicators[group_id] = comm  # stays away, but alive
        return comm.recorded().calls, time.monotonic_ns(), True
    graph.replay()
    stuck = torch.cuda.current_stream().record_event()
    deadline = time.monotonic() + ABORT_LIMIT_S
    while comm.recorded().calls[-1].ended_ns and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)  # the kernel has had the time to end, had it not waited
    begun = time.monotonic()
    records, now_ns = comm.recorded().calls, time.monotonic_ns()
    assert time.monotonic() - begun < 1.0
    assert not stuck.query() and records[-1].ended_ns == 0, records[-3:]
    assert 0.1e9 < now_ns - records[-1].begun_ns < ABORT_LIMIT_S * 1e9, (now_ns, records[-1])
    comm.abort()
    while not stuck.query() and time.monotonic() < deadline:
        time.sleep(0.001)
    return records, now_ns, stuck.query()


def waits_when_the_last_rank_is_late(
    rank: Rank, backend: str, group_id: bytes, num_elements: int
) -> list[int]:
    """What this rank waited in ten calls, nanoseconds of its own clock."""
    comm = rank.shared(backend, group_id)
    tensor = torch.zeros(num_elements, dtype=torch.bfloat16, device=rank.device)
    for _ in range(10):
        if rank.rank == rank.world_size - 1:
            torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
        comm.all_reduce(tensor)
    torch.cuda.synchronize()
    records = comm.recorded().calls[-10:]
    assert all(record.ended_ns for record in records)
    return [record.ended_ns - record.begun_ns for record in records]
