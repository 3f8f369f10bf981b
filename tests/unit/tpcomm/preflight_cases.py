"""What the ranks do in the preflight tests, with faults planted on rank 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.unit.tpcomm.rank_pool import Rank
from tpcomm import CommError, CommTimeout, PathReport, ReduceOp, preflight
from tpcomm.cpu import ShmCommunicator
from tpcomm.path_times import build_table
from tpcomm.paths import CommPath, HasPaths
from tpcomm.preflight import check_paths, time_paths


def sound(rank: Rank, backend: str, group_id: bytes) -> list[PathReport]:
    return preflight(rank.shared(backend, group_id), 10.0)


def planted(rank: Rank, group_id: bytes, fault: str) -> tuple[list[PathReport], list[str]]:
    """A second path beside shm's own. It computes the sums by itself, so that ranks may stop at
    different points, and goes wrong on rank 1 in the way `fault` says; also what was done to it.
    """
    comm = rank.shared("shm", group_id)
    assert isinstance(comm, HasPaths)
    faulty = rank.rank == 1
    events: list[str] = []

    def all_reduce(tensor: Tensor, op: ReduceOp) -> Tensor:
        index = torch.arange(tensor.numel())
        first, second = ((index * 7 + r * 13) % 17 - 8 for r in range(2))
        tensor.copy_(torch.maximum(first, second) if op == ReduceOp.MAX else first + second)
        if faulty and fault == "flip" and tensor.numel() == 333:
            tensor.view(torch.uint8)[7] ^= 1
        if faulty and fault == "raise":
            raise CommError("planted error")
        return tensor

    def wait(timeout_s: float) -> None:
        if faulty and fault == "hang":
            raise CommTimeout("planted hang")

    path = CommPath(
        "planted",
        rank.device,
        all_reduce,
        absent="planted absence" if fault == "absent" else "",
        prepare=lambda tensor, op: events.append("prepared"),
        wait=wait,
        rescue=lambda timeout_s: events.append("rescued"),
        switch_off=lambda reason, hung: events.append("off, hung" if hung else "off"),
    )
    return check_paths(comm, [path, *comm.paths()], 5.0), sorted(set(events))


def broken_base(rank: Rank, group_id: bytes) -> list[PathReport]:
    """The group's own path gives rank 1 wrong sums of 4096 elements."""
    comm = rank.shared("shm", group_id)

    def all_reduce(tensor: Tensor, op: ReduceOp) -> Tensor:
        comm.all_reduce(tensor, op)
        if rank.rank == 1 and tensor.numel() == 4096:
            tensor[4095] += 1
        return tensor

    base = CommPath("base", rank.device, all_reduce)
    assert isinstance(comm, HasPaths)
    return check_paths(comm, [CommPath("other", rank.device, all_reduce), base], 5.0)


def lost_peer(rank: Rank, group_id: bytes) -> list[PathReport]:
    """Rank 1 joins and does nothing."""
    comm = rank.join("shm", group_id, 1.0)
    if rank.rank == 1:
        rank.communicators[group_id] = comm
        return []
    return preflight(comm, 1.0)


def planted_times(
    rank: Rank, group_id: bytes, fault: str
) -> tuple[list[tuple[str, bool, dict[int, float]]], list[str], str]:
    """Two paths beside shm's own, of which `fast` is timed as `fault` says on rank 1.

    Verdicts and times, what was done to `fast`, and the table that follows.
    """
    comm = rank.shared("shm", group_id)
    assert isinstance(comm, HasPaths)
    events: list[str] = []

    def measure(base_us: float) -> Callable[[Callable[[], object], float], float]:
        def measured(call: Callable[[], object], timeout_s: float) -> float:
            if fault == "hang" and rank.rank == 1 and base_us == 1.0:
                raise CommTimeout("planted hang")
            size[0] += 1
            return base_us + rank.rank * 0.5 + size[0] * (1.0 if base_us == 1.0 else 0.25)

        size = [0]
        return measured

    def path(name: str, base_us: float) -> CommPath:
        return CommPath(
            name,
            rank.device,
            comm.all_reduce if isinstance(comm, ShmCommunicator) else None,
            max_bytes=1 << 20,
            rescue=lambda timeout_s: events.append("rescued"),
            switch_off=lambda reason, hung: events.append(f"{name} off: {reason}"),
            measure=measure(base_us),
        )

    paths = [path("fast", 1.0), path("slow", 5.0), *comm.paths()]
    reports = check_paths(comm, paths, 5.0)
    reports = time_paths(paths, reports, 5.0, 8192, torch.bfloat16)
    table = build_table({(r.operation, r.path): dict(r.times) for r in reports if r.usable})
    rows = [(r.path, r.usable, dict(r.times)) for r in reports]
    return rows, events, table.describe()
