"""When staging memory is used and when not; NCCL and CUDA are played by doubles."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tpcomm import CommError, ReduceOp, staged
from tpcomm.communicator import CommStats
from tpcomm.nccl import NcclCommunicator
from tpcomm.staged import StagedCommunicator

CPU = torch.device("cpu")


class FakeStaging:
    """Takes messages of up to 64 bytes and notes what was done to it."""

    def __init__(self, events: list[str], connect_error: str) -> None:
        self.limit_bytes = 64
        self._events = events
        self._connect_error = connect_error

    def connect(self, name: str, timeout_s: float) -> None:
        if self._connect_error:
            raise CommError(self._connect_error)
        self._events.append(f"connect {name}")

    def all_reduce(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        self._events.append(f"staged {tensor.nbytes}")
        return tensor

    def compile(self, tensor: Tensor, op: ReduceOp) -> None:
        self._events.append("compile")

    def abort(self) -> None:
        self._events.append("abort staging")

    def close(self) -> None:
        self._events.append("close staging")


class Group:
    """How the other rank and this rank's staging behave."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.same_host = True
        self.same_size = True
        self.peer_failed = False
        self.create_error = ""
        self.connect_error = ""

    def join(self, monkeypatch: pytest.MonkeyPatch, staging_bytes: int = 64) -> StagedCommunicator:
        def init(comm: Any, *arguments: Any) -> None:
            comm.rank, comm.world_size, comm.device, comm.timeout_s = 0, 2, CPU, 1.0
            comm.stats = CommStats()

        def reduce(comm: Any, tensor: Tensor, op: ReduceOp) -> Tensor:
            self.events.append(f"nccl {tensor.nbytes}")
            if self.peer_failed and op == ReduceOp.MAX:
                tensor.fill_(1)
            return tensor

        def gather(comm: Any, tensor: Tensor, out: Tensor) -> None:
            difference = torch.tensor([int(not self.same_host), int(not self.same_size)])
            out.copy_(torch.stack([tensor, tensor + difference]))

        def make_staging(*arguments: Any) -> FakeStaging:
            if self.create_error:
                raise CommError(self.create_error)
            return FakeStaging(self.events, self.connect_error)

        monkeypatch.setattr(NcclCommunicator, "__init__", init)
        monkeypatch.setattr(NcclCommunicator, "_enqueue_all_reduce", reduce)
        monkeypatch.setattr(NcclCommunicator, "_enqueue_all_gather", gather)
        monkeypatch.setattr(NcclCommunicator, "wait_stream", lambda *arguments: None)
        monkeypatch.setattr(NcclCommunicator, "_usable", lambda comm: None)
        monkeypatch.setattr(staged, "Staging", make_staging)
        monkeypatch.setattr(staged, "load_cuda_driver", lambda: None)
        comm = StagedCommunicator(cast(Any, None), b"", 0, 2, CPU, 1.0, staging_bytes, "group")
        return comm


@pytest.fixture
def group() -> Group:
    return Group()


def test_size_rule_sends_small_messages_to_staging(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = group.join(monkeypatch)
    assert comm.staging_absent == ""
    group.events.clear()
    for num_elements in (0, 1, 16, 17):
        comm.all_reduce(torch.zeros(num_elements))
    assert group.events == ["staged 4", "staged 64", "nccl 68"]
    assert (comm.stats.all_reduce.calls, comm.stats.all_reduce.bytes) == (4, 136)


def test_path_that_is_switched_off_leaves_all_to_nccl(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = group.join(monkeypatch)
    staged_path, nccl_path = comm.paths()
    assert (staged_path.name, staged_path.max_bytes, nccl_path.name) == ("staged", 64, "nccl")
    assert staged_path.switch_off is not None
    staged_path.switch_off("found wrong")
    group.events.clear()
    comm.all_reduce(torch.zeros(1))
    assert group.events == ["nccl 4"]
    assert comm.paths()[0].absent == "found wrong"


@pytest.mark.parametrize(
    ("attribute", "value", "reason", "closed"),
    [
        ("same_host", False, "different hosts", False),
        ("same_size", False, "differ between ranks: [64, 65]", False),
        ("create_error", "no VMM", "no VMM", False),
        ("connect_error", "no peer access", "no peer access", True),
        ("peer_failed", True, "another rank could not use it", True),
    ],
)
def test_staging_is_off_with_its_reason_when_any_rank_cannot(
    group: Group,
    monkeypatch: pytest.MonkeyPatch,
    attribute: str,
    value: object,
    reason: str,
    closed: bool,
) -> None:
    setattr(group, attribute, value)
    comm = group.join(monkeypatch)
    assert reason in comm.staging_absent
    assert comm.paths()[0].absent == comm.staging_absent
    assert ("close staging" in group.events) == closed
    group.events.clear()
    comm.all_reduce(torch.zeros(1))
    assert group.events == ["nccl 4"]


def test_no_staging_bytes_means_no_staging(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "staging_bytes is 0" in group.join(monkeypatch, staging_bytes=0).staging_absent
