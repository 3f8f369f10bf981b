"""The group of one."""

from __future__ import annotations

import pytest
import torch

from tpcomm import CommAborted, CommError, create_communicator
from tpcomm.local import LocalCommunicator

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["nccl", "shm", "gloo"])
def test_every_backend_gives_local_group_for_one_rank(backend: str) -> None:
    comm = create_communicator(backend, b"unread", 0, 1, CPU, 1.0)
    assert isinstance(comm, LocalCommunicator)


def test_collectives_are_the_identity_and_are_counted() -> None:
    comm = LocalCommunicator(CPU)
    tensor = torch.arange(6.0).view(2, 3)
    assert comm.all_reduce(tensor) is tensor
    assert comm.broadcast(tensor) is tensor
    assert torch.equal(comm.all_gather(tensor), torch.arange(6.0).view(1, 2, 3))
    comm.barrier(1.0)
    assert (comm.stats.all_reduce.calls, comm.stats.all_reduce.bytes) == (1, 24)
    assert comm.stats.all_gather.calls == comm.stats.broadcast.calls == 1
    assert comm.stats.barrier.calls == 1


def test_arguments_are_checked_as_in_larger_groups() -> None:
    comm = LocalCommunicator(CPU)
    with pytest.raises(ValueError, match="contiguous"):
        comm.all_reduce(torch.zeros(2, 3).t())
    with pytest.raises(ValueError, match=r"torch\.float64"):
        comm.all_reduce(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="root 1"):
        comm.broadcast(torch.zeros(2), 1)


def test_aborted_and_closed_groups_refuse_calls() -> None:
    aborted, closed = LocalCommunicator(CPU), LocalCommunicator(CPU)
    aborted.abort()
    closed.close()
    with pytest.raises(CommAborted):
        aborted.all_reduce(torch.zeros(1))
    with pytest.raises(CommError, match="closed"):
        closed.barrier(1.0)
