"""What the ranks do in the collective tests: each function runs on every rank of a pool."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tests.unit.tpcomm.rank_pool import Rank
from tpcomm import CollectiveRecord, CommAborted, CommError, CommTimeout, ReduceOp
from tpcomm.norm_kernel import add_rms_norm_reference

ABORT_TIMEOUT_S = 4.0


def make_input(rank: int, shape: tuple[int, ...], dtype: torch.dtype, integral: bool) -> Tensor:
    """Rank `rank`'s input, the same wherever it is computed."""
    generator = torch.Generator().manual_seed(1000 + rank)
    if integral or not dtype.is_floating_point:
        return torch.randint(-40, 40, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def expected_reduction(inputs: list[Tensor], op: ReduceOp) -> Tensor:
    """Rank order; 16-bit floats in float32, rounded once."""
    wide = torch.float32 if inputs[0].dtype.itemsize == 2 else inputs[0].dtype
    total = inputs[0].to(wide)
    for part in inputs[1:]:
        total = torch.maximum(total, part.to(wide)) if op == ReduceOp.MAX else total + part.to(wide)
    return total.to(inputs[0].dtype)


def digest(tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def all_reduce(
    rank: Rank,
    backend: str,
    group_id: bytes,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    op: ReduceOp,
    integral: bool,
) -> str:
    comm = rank.shared(backend, group_id)
    inputs = [make_input(r, shape, dtype, integral) for r in range(rank.world_size)]
    tensor = inputs[rank.rank].to(rank.device, copy=True)
    before = comm.stats.all_reduce.calls, comm.stats.all_reduce.bytes
    seconds = comm.stats.seconds
    result = comm.all_reduce(tensor, op)
    assert result is tensor
    after = comm.stats.all_reduce.calls, comm.stats.all_reduce.bytes
    assert after == (before[0] + 1, before[1] + tensor.nbytes)
    if rank.device.type == "cpu":
        assert seconds is not None and comm.stats.seconds is not None
        assert comm.stats.seconds > seconds
    else:
        assert comm.stats.seconds is None
    torch.testing.assert_close(tensor.cpu(), expected_reduction(inputs, op), rtol=0, atol=0)
    return digest(tensor)


def all_gather(
    rank: Rank, backend: str, group_id: bytes, shape: tuple[int, ...], dtype: torch.dtype
) -> str:
    comm = rank.shared(backend, group_id)
    inputs = [make_input(r, shape, dtype, True) for r in range(rank.world_size)]
    tensor = inputs[rank.rank].to(rank.device, copy=True)
    fresh = comm.all_gather(tensor)
    out = torch.empty((rank.world_size, *shape), dtype=dtype, device=rank.device)
    assert comm.all_gather(tensor, out) is out
    expected = torch.stack(inputs)
    assert torch.equal(fresh.cpu(), expected)
    assert torch.equal(out.cpu(), expected)
    assert torch.equal(tensor.cpu(), inputs[rank.rank])
    return digest(out)


def broadcast(
    rank: Rank, backend: str, group_id: bytes, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    comm = rank.shared(backend, group_id)
    for root in range(rank.world_size):
        tensor = make_input(rank.rank, shape, dtype, True).to(rank.device)
        assert comm.broadcast(tensor, root) is tensor
        assert torch.equal(tensor.cpu(), make_input(root, shape, dtype, True))


def mixed_sequence(rank: Rank, backend: str, group_id: bytes) -> str:
    """Many different calls back to back, with ranks out of step: slots must not be reused early."""
    comm = rank.shared(backend, group_id)
    digests = hashlib.sha256()
    for step in range(60):
        if step % rank.world_size == rank.rank:
            time.sleep(0.0005)  # load for the test, not synchronisation
        value = torch.full((1 + 37 * (step % 9),), float(rank.rank + step), device=rank.device)
        digests.update(digest(comm.all_reduce(value.clone())).encode())
        digests.update(digest(comm.all_gather(value[:3])).encode())
        root = step % rank.world_size
        comm.broadcast(value, root)
        assert value[0].item() == root + step
        if step % 20 == 0:
            comm.barrier(20.0)
    return digests.hexdigest()


def inference_mode(rank: Rank, backend: str, group_id: bytes) -> None:
    """A shape first used in inference mode is used outside afterwards, and the other way round."""
    comm = rank.shared(backend, group_id)
    for modes in ((True, False), (False, True)):
        length = 11 if modes[0] else 13
        for mode in modes:
            with torch.inference_mode(mode):
                tensor = torch.ones(length, device=rank.device)
                comm.all_reduce(tensor)
                assert tensor[0].item() == rank.world_size


def refusals(rank: Rank, backend: str, group_id: bytes) -> list[str]:
    """Messages of the calls that every backend refuses, without harm to the group."""
    comm = rank.shared(backend, group_id)
    square = torch.zeros(4, 4, device=rank.device)
    buffer = torch.zeros((rank.world_size + 1) * 4, device=rank.device)
    overlapping = buffer[: rank.world_size * 4].view(rank.world_size, 4)
    calls: list[Callable[[], Tensor]] = [
        lambda: comm.all_reduce(square.t()),
        lambda: comm.all_reduce(torch.zeros(2, dtype=torch.bool, device=rank.device)),
        lambda: comm.all_reduce(torch.zeros(2, device="meta")),
        lambda: comm.all_gather(square, torch.zeros(4, 4, device=rank.device)),
        lambda: comm.all_gather(buffer[2:6], overlapping),
        lambda: comm.broadcast(square, rank.world_size),
    ]
    messages = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
        else:
            messages.append("accepted")
    comm.barrier(20.0)
    return messages


def join_and_close(rank: Rank, backend: str, group_id: bytes) -> str:
    comm = rank.join(backend, group_id, 20.0)
    comm.all_reduce(torch.ones(4, device=rank.device))
    comm.close()
    comm.close()
    try:
        comm.all_reduce(torch.ones(4, device=rank.device))
    except CommError as error:
        return str(error)
    return "accepted"


def join_with_absent_rank(
    rank: Rank, backend: str, group_id: bytes, absent: int
) -> tuple[str, tuple[int, ...]]:
    if rank.rank == absent:
        return "absent", ()
    try:
        rank.join(backend, group_id, 1.0)
    except CommTimeout as error:
        return str(error), error.missing_ranks
    return "joined", ()


def call_with_absent_rank(
    rank: Rank, backend: str, group_id: bytes, absent: int, call: str
) -> tuple[str, tuple[int, ...]]:
    """All but one rank issue a collective; what they are told."""
    comm = rank.join(backend, group_id, 1.0)
    comm.all_reduce(torch.ones(3, device=rank.device))
    if rank.rank == absent:
        rank.communicators[group_id] = comm  # stays away, but alive
        return "absent", ()
    try:
        if call == "barrier":
            comm.barrier(0.3)
        else:
            comm.all_reduce(torch.ones(3, device=rank.device))
    except CommTimeout as error:
        comm.close()
        return str(error), error.missing_ranks
    return "completed", ()


def abort_while_waiting(rank: Rank, backend: str, group_id: bytes) -> tuple[str, float]:
    """The last rank stays away; every other rank is freed by an abort from its own thread."""
    comm = rank.join(backend, group_id, ABORT_TIMEOUT_S)
    if rank.rank == rank.world_size - 1:
        rank.communicators[group_id] = comm  # stays away, but alive
        return "absent", 0.0
    timer = threading.Timer(0.1, comm.abort)
    timer.start()
    begin = time.monotonic()
    try:
        comm.all_reduce(torch.ones(3, device=rank.device))
        if rank.device.type == "cuda":  # the call only enqueues
            comm.barrier(ABORT_TIMEOUT_S)
        outcome = "completed"
    except CommAborted:
        outcome = "aborted"
    waited = time.monotonic() - begin
    timer.join(10)
    try:
        comm.all_reduce(torch.ones(3, device=rank.device))
        outcome += ", then usable"
    except CommAborted:
        outcome += ", then refused"
    return outcome, waited


def mismatched_calls(rank: Rank, group_id: bytes) -> str:
    comm = rank.join("shm", group_id, 5.0)
    try:
        comm.all_reduce(torch.ones(3 if rank.rank == 0 else 5))
    except CommError as error:
        return str(error)
    return "completed"


def kill_a_rank(rank: Rank, group_id: bytes) -> tuple[str, list[str]]:
    """Rank 1 dies by SIGKILL inside the group: what rank 0 is told, and what is left mapped."""
    if rank.rank == 1:
        child = os.fork()
        if child == 0:
            comm = rank.join("shm", group_id, 10.0)
            comm.all_reduce(torch.ones(3))
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        return "", _segments_in_use()
    comm = rank.join("shm", group_id, 2.0)
    comm.all_reduce(torch.ones(3))
    try:
        comm.all_reduce(torch.ones(3))
        outcome = "completed"
    except CommTimeout as error:
        outcome = str(error)
    comm.close()
    del comm
    return outcome, _segments_in_use()


def segment_mapped(rank: Rank, group_id: bytes) -> bool:
    """Whether the probe used by kill_a_rank sees a segment that is in use."""
    comm = rank.join("shm", group_id, 10.0)
    seen = any(_name_of(group_id) in line for line in _segments_in_use())
    comm.close()
    return seen


def _name_of(group_id: bytes) -> str:
    from tpcomm.group_id import parse_group_id

    return parse_group_id(group_id, "shm").name


def _segments_in_use() -> list[str]:
    with open("/proc/self/maps") as maps:
        mapped = [line for line in maps if "tpcomm-" in line]
    return mapped + [name for name in os.listdir("/dev/shm") if "tpcomm" in name]


def all_reduce_add_rms_norm(
    rank: Rank, backend: str, group_id: bytes, dtype: torch.dtype
) -> tuple[str, str]:
    """Sum, residual and norm against the three steps one by one; digests of both results."""
    comm = rank.shared(backend, group_id)
    digests = ""
    for shape in ((1, 64), (5, 333), (7, 1024)):
        inputs = [make_input(r, shape, dtype, True) for r in range(rank.world_size)]
        residual = make_input(40, shape, dtype, True)
        weight = make_input(41, shape[1:], dtype, True)
        updated = residual.to(rank.device, copy=True)
        arguments = inputs[rank.rank].to(rank.device, copy=True), updated, weight.to(rank.device)
        calls = comm.stats.all_reduce.calls
        normed = comm.all_reduce_add_rms_norm(*arguments, 1e-5)
        assert comm.stats.all_reduce.calls == calls + 1
        total = expected_reduction(inputs, ReduceOp.SUM)
        expected = add_rms_norm_reference(total, residual, weight, 1e-5)
        assert torch.equal(updated.cpu(), residual)
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(normed.cpu(), expected, rtol=tolerance, atol=tolerance)
        digests += digest(normed)
    return digests, digest(updated)


def recorded_calls(rank: Rank, backend: str, group_id: bytes) -> list[tuple[int, str, int]]:
    """Sequence, operation and bytes of five calls; the rest is checked here."""
    comm = rank.shared(backend, group_id)
    comm.all_reduce(torch.ones(100, device=rank.device))
    comm.all_reduce(torch.ones(10, device=rank.device), ReduceOp.MAX)
    comm.all_gather(torch.ones(3, device=rank.device).long())
    comm.broadcast(torch.ones(20, device=rank.device))
    comm.barrier(20.0)
    records = comm.recorded().calls[-5:]
    assert rank.device.type == "cuda" or {record.path for record in records} == {backend}
    now = time.monotonic_ns()
    times = [value for record in records for value in (record.begun_ns, record.ended_ns)]
    assert times == sorted(times) and times[-1] <= now, (times, now)
    sequences = [record.sequence for record in records]
    assert sequences == sorted(set(sequences)), sequences
    return [(record.sequence, record.operation, record.num_bytes) for record in records]


def record_of_a_waiting_call(
    rank: Rank, backend: str, group_id: bytes
) -> list[tuple[str, int, bool]]:
    """The last rank stays away from the second call; operation, bytes and whether it ended."""
    comm = rank.join(backend, group_id, ABORT_TIMEOUT_S)
    comm.all_reduce(torch.ones(3, device=rank.device))
    if rank.device.type == "cuda":
        torch.cuda.synchronize()
    is_absent = rank.rank == rank.world_size - 1
    found: list[CollectiveRecord] = []

    def read() -> None:
        """From another thread, as soon as the call has begun."""
        deadline = time.monotonic() + ABORT_TIMEOUT_S / 2
        while not is_absent and comm.recorded().calls[-1].num_bytes != 28:
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        found.extend(comm.recorded().calls)
        if not is_absent:
            comm.abort()

    if is_absent:
        rank.communicators[group_id] = comm  # stays away, but alive
        read()
    else:
        reader = threading.Thread(target=read)
        reader.start()
        try:
            comm.all_reduce(torch.ones(7, device=rank.device))
            if rank.device.type == "cuda":  # the call only enqueues
                comm.barrier(ABORT_TIMEOUT_S)
        except CommAborted:
            pass
        reader.join(10)
    calls = [record for record in found if record.operation == "all_reduce"]
    return [(record.operation, record.num_bytes, record.ended_ns != 0) for record in calls]
