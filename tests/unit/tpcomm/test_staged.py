"""When staging memory is used and when not; NCCL and CUDA are played by doubles."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tpcomm import CommError, ReduceOp, nccl, size_table, staged
from tpcomm.communicator import CommStats
from tpcomm.nccl import NcclCommunicator
from tpcomm.size_table import Route, SizeTable
from tpcomm.staged import StagedCommunicator
from tpcomm.staged_ways import STAGED_WAYS
from tpcomm.staging_tables import CHUNK_BYTES, make_ring, make_tables

CPU = torch.device("cpu")
TABLE = SizeTable(
    [
        Route(size_table.ALL_REDUCE, 32, size_table.ONE_SHOT),
        Route(size_table.ALL_REDUCE, 64, size_table.TWO_SHOT),
        Route(size_table.ALL_GATHER, 16, size_table.STAGED),
        Route(size_table.ADD_RMS_NORM, 32, size_table.FUSED),
    ]
)
OTHER_WAYS = [
    (size_table.ALL_GATHER, size_table.NCCL),
    (size_table.ADD_RMS_NORM, size_table.SEPARATE),
    (size_table.ALL_REDUCE, size_table.NCCL),
]


class FakeStaging:
    """Takes messages of up to 64 bytes and notes what was done to it."""

    device = CPU
    tables = make_tables(2, 0, CHUNK_BYTES, CPU)

    def __init__(self, events: list[str], connect_error: str) -> None:
        self.limit_bytes = 64
        self._events = events
        self._connect_error = connect_error

    def connect(self, name: str, timeout_s: float) -> None:
        if self._connect_error:
            raise CommError(self._connect_error)
        self._events.append(f"connect {name}")

    def takes_one_shot(self, tensor: Tensor) -> bool:
        wire_bytes = tensor.nbytes if tensor.dtype.is_floating_point else 2 * tensor.nbytes
        return 0 < wire_bytes <= self.limit_bytes

    def takes_two_shot(self, tensor: Tensor) -> bool:
        return tensor.dtype.is_floating_point and 0 < tensor.nbytes <= self.limit_bytes

    def takes_all_gather(self, tensor: Tensor) -> bool:
        return 0 < 2 * tensor.nbytes <= self.limit_bytes

    def takes_add_rms_norm(self, tensor: Tensor, residual: Tensor, weight: Tensor) -> bool:
        return 0 < tensor.nbytes <= self.limit_bytes

    def one_shot(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        self._events.append(f"one_shot {tensor.nbytes}")
        return tensor

    def two_shot(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        self._events.append(f"two_shot {tensor.nbytes}")
        return tensor

    def all_gather(self, tensor: Tensor, out: Tensor) -> Tensor:
        self._events.append(f"gather {tensor.nbytes}")
        return out

    def all_reduce_add_rms_norm(
        self, tensor: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        self._events.append(f"fused {tensor.nbytes}")
        return tensor

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
            comm._aborted, comm._token, comm._handle = threading.Event(), torch.ones(1), None
            comm.is_recording, comm._reader = False, None
            comm._state, comm._ring = torch.zeros(1, dtype=torch.int64), make_ring(CPU)

        def reduce(comm: Any, tensor: Tensor, op: ReduceOp) -> Tensor:
            self.events.append(f"nccl {tensor.nbytes}")
            if self.peer_failed and op == ReduceOp.MAX:
                tensor.fill_(1)
            return tensor

        def gather(comm: Any, tensor: Tensor, out: Tensor) -> None:
            self.events.append(f"nccl gather {tensor.nbytes}")
            if tensor.dtype != torch.int64:
                return
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
        monkeypatch.setattr(nccl, "HAS_TRITON", False)  # no kernel of ours on the CPU
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
    comm.table = TABLE
    for num_elements in (0, 1, 8, 16, 17):
        comm.all_reduce(torch.zeros(num_elements))
    assert group.events == ["one_shot 4", "one_shot 32", "two_shot 64", "nccl 68"]
    assert (comm.stats.all_reduce.calls, comm.stats.all_reduce.bytes) == (5, 168)


def test_integers_take_twice_their_size_and_never_two_shot(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = group.join(monkeypatch)
    comm.table = TABLE
    group.events.clear()
    for num_elements in (4, 8, 9):
        comm.all_reduce(torch.zeros(num_elements, dtype=torch.int32))
    assert group.events == ["one_shot 16", "one_shot 32", "nccl 36"]


def test_size_rule_of_gathers_and_of_the_fused_norm(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = group.join(monkeypatch)
    comm.table = TABLE
    group.events.clear()
    comm.all_gather(torch.zeros(2))
    comm.all_gather(torch.zeros(9))
    for num_elements in (4, 16):
        row = torch.zeros(1, num_elements)
        comm.all_reduce_add_rms_norm(row, row.clone(), row[0], 1e-5, lambda x, r, w, eps: x)
    assert group.events == ["gather 8", "nccl gather 36", "fused 16", "two_shot 64"]
    assert comm.stats.all_reduce.calls == 2


def test_path_that_is_switched_off_leaves_all_to_nccl(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = group.join(monkeypatch)
    comm.table = TABLE
    ways = {(path.operation, path.name): path for path in comm.paths()}
    assert list(ways) == [*STAGED_WAYS, *OTHER_WAYS]
    one_shot = ways[STAGED_WAYS[0]]
    assert one_shot.max_bytes == 64 and one_shot.switch_off is not None
    one_shot.switch_off("found wrong", False)
    group.events.clear()
    comm.all_reduce(torch.zeros(1))
    comm.all_gather(torch.zeros(1))
    assert group.events == ["two_shot 4", "gather 4"]
    assert comm.paths()[0].absent == "found wrong" and not comm.paths()[1].absent


def test_path_that_hung_takes_staging_memory_with_it(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = group.join(monkeypatch)
    fused = comm.paths()[3]
    assert fused.switch_off is not None
    fused.switch_off("hung", True)
    group.events.clear()
    row = torch.zeros(1, 4)
    comm.all_reduce_add_rms_norm(row, row.clone(), row[0], 1e-5, lambda x, r, w, eps: x)
    comm.all_gather(torch.zeros(1))
    assert group.events == ["nccl 16", "nccl gather 4"]
    assert [path.absent for path in comm.paths()[:4]] == ["hung"] * 4


def test_rejoin_after_an_abort_keeps_the_buffer_and_begins_anew(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = group.join(monkeypatch)
    staging, table = comm.staging, comm.table.routes
    with pytest.raises(CommError, match="was aborted"):
        comm.rejoin(b"id", "too early")
    comm.paths()[0].switch_off("found wrong", False)  # type: ignore[misc]
    comm._aborted.set()
    monkeypatch.setattr(staged, "wait_idle", lambda limit_s, what: group.events.append("drained"))
    monkeypatch.setattr(StagedCommunicator, "_join_group", lambda comm, unique_id: unique_id)
    monkeypatch.setattr(StagedCommunicator, "_warm_up", lambda comm: group.events.append("nccl"))
    group.events.clear()
    comm.rejoin(b"id", "second")
    steps = [event for event in group.events if "4" not in event]  # without agreements
    assert steps[:2] == ["drained", "nccl"] and steps[-1] == "connect second"
    assert comm.staging is staging and comm.table.routes == table
    assert not comm.paths()[0].absent


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
