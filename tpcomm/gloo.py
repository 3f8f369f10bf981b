"""Collectives over gloo, for CPU ranks on different hosts.

The ranks meet at a TCPStore that rank 0 serves at the address in the group id. Each builds its
own ProcessGroupGloo; torch.distributed's default group is neither made nor needed. Work runs in
gloo's threads while the caller polls, so that `abort` can free it: gloo itself cannot be
interrupted, and closing after a failure may take the rest of the time limit. An abort is local;
peers that wait for an aborted rank run into their own time limit.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from tpcomm.call_log import CallLog, logged
from tpcomm.communicator import (
    AddRmsNorm,
    ReduceOp,
    as_bytes,
    check_layout,
    check_reducible,
    check_root,
    describe_ranks,
    gather_output,
)
from tpcomm.errors import CommAborted, CommError, CommTimeout
from tpcomm.group_id import GroupId
from tpcomm.norm_kernel import add_rms_norm_reference
from tpcomm.paths import CommPath
from tpcomm.records import ALL_REDUCE_MAX, BARRIER, BROADCAST, Recorded
from tpcomm.size_table import ALL_GATHER, ALL_REDUCE

_c10d: Any = torch.distributed  # its stubs leave out the stores and ProcessGroupGloo's methods
_CPU = torch.device("cpu")
_POLL_SECONDS = 0.00002
_ROLL_CALL_SECONDS = 0.5
_GLOO_MARGIN_SECONDS = 0.2


class GlooCommunicator:
    """16-bit floats are gathered and summed in float32 in rank order, as the other backends do."""

    def __init__(self, group: GroupId, rank: int, world_size: int, timeout_s: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.log = CallLog("gloo")
        self.stats = self.log.stats
        self._timeout_s = timeout_s
        self._num_calls = 0
        self._aborted = threading.Event()
        self._failed = False
        self._store = _join_store(group, rank, world_size, timeout_s)
        self._process_group: Any = _process_group(self._store, group, rank, world_size, timeout_s)
        self.barrier(timeout_s)

    @logged
    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        check_layout(tensor, _CPU)
        check_reducible(tensor)
        operation = ALL_REDUCE if op == ReduceOp.SUM else ALL_REDUCE_MAX
        self.log.begin(operation, self.stats.all_reduce, tensor.nbytes)
        if tensor.numel() == 0:
            return tensor
        gathered = torch.empty((self.world_size, *tensor.shape), dtype=tensor.dtype)
        self._gather_bytes(tensor, gathered)
        if op == ReduceOp.MAX:
            return torch.amax(gathered, dim=0, out=tensor)
        total = gathered[0].float() if tensor.dtype.itemsize == 2 else gathered[0]
        for part in gathered[1:]:
            total.add_(part)
        return tensor.copy_(total)

    @logged
    def all_gather(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        check_layout(tensor, _CPU)
        out = gather_output(tensor, out, self.world_size)
        self.log.begin(ALL_GATHER, self.stats.all_gather, tensor.nbytes)
        if tensor.numel():
            self._gather_bytes(tensor, out)
        return out

    def all_reduce_add_rms_norm(
        self,
        tensor: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        add_rms_norm: AddRmsNorm = add_rms_norm_reference,
    ) -> Tensor:
        return add_rms_norm(self.all_reduce(tensor), residual, weight, eps)

    @logged
    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        check_layout(tensor, _CPU)
        check_root(root, self.world_size)
        self.log.begin(BROADCAST, self.stats.broadcast, tensor.nbytes)
        if tensor.numel():
            options = _c10d.BroadcastOptions()
            options.rootRank = root
            raw = as_bytes(tensor)
            self._run(lambda group: group.broadcast([raw], options), self._timeout_s)
        return tensor

    @logged
    def barrier(self, timeout_s: float) -> None:
        # An all-gather of one byte: gloo's own barrier keeps a time limit of its own.
        self.log.begin(BARRIER, self.stats.barrier, 0)
        token = torch.zeros(1, dtype=torch.uint8)
        self._gather_bytes(token, torch.empty(self.world_size, dtype=torch.uint8), timeout_s)

    def paths(self) -> list[CommPath]:
        """This backend's only way."""
        return [CommPath("gloo", _CPU, self.all_reduce)]

    def recorded(self) -> Recorded:
        return self.log.recorded()

    def abort(self) -> None:
        self._aborted.set()

    def close(self) -> None:
        if self._process_group is None:
            return
        try:
            if not self._failed and not self._aborted.is_set():
                self.barrier(self._timeout_s)
        finally:
            self._process_group = None

    def _gather_bytes(self, tensor: Tensor, out: Tensor, timeout_s: float | None = None) -> None:
        raw = as_bytes(tensor)
        rows = list(out.view(self.world_size, -1).view(torch.uint8))
        self._run(lambda group: group.allgather([rows], [raw]), timeout_s or self._timeout_s)

    def _run(self, issue: Callable[[Any], Any], timeout_s: float) -> None:
        """Issue one collective and wait for it, for an abort, or for the limit."""
        if self._aborted.is_set() or self._failed:
            raise CommAborted("the communicator was aborted or has failed before")
        if self._process_group is None:
            raise CommError("the communicator is closed")
        self._num_calls += 1
        deadline = time.monotonic() + timeout_s
        try:
            work = issue(self._process_group)
            while not work.is_completed():
                if self._aborted.is_set():
                    raise CommAborted(f"aborted in call {self._num_calls}")
                if time.monotonic() > deadline:
                    raise self._timed_out(timeout_s)
                time.sleep(_POLL_SECONDS)
            work.wait()
        except CommError:
            self._failed = True
            raise
        except RuntimeError as error:  # gloo reports a lost connection this way
            self._failed = True
            raise CommError(f"gloo failed in call {self._num_calls}: {error}") from error

    def _timed_out(self, timeout_s: float) -> CommTimeout:
        """Roll call through the store: whoever hangs in this call too has arrived, the rest not."""
        prefix = f"waiting/{self._num_calls}"
        missing = []
        try:
            self._store.set(f"{prefix}/{self.rank}", b"1")
            deadline = time.monotonic() + _ROLL_CALL_SECONDS
            for peer in range(self.world_size):
                remaining = timedelta(seconds=max(0.01, deadline - time.monotonic()))
                if not _has_key(self._store, f"{prefix}/{peer}", remaining):
                    missing.append(peer)
        except _c10d.DistNetworkError:
            missing = [0]  # the store is rank 0's
        who = describe_ranks(missing) if missing else "some rank"
        return CommTimeout(
            f"{who} did not arrive in call {self._num_calls} within {timeout_s:g} s", missing
        )


def free_port(host: str) -> int:
    """A TCP port that is free on `host` now. Rank 0 binds it later and says so if it was taken."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


def _join_store(group: GroupId, rank: int, world_size: int, timeout_s: float) -> Any:
    limit = timedelta(seconds=timeout_s)
    try:
        store = _c10d.TCPStore(
            group.host, group.port, None, rank == 0, limit, wait_for_workers=False
        )
    except _c10d.DistNetworkError as error:
        place = f"{group.host}:{group.port}"
        if rank == 0:
            raise CommError(f"rank 0 cannot serve the store at {place}: {error}") from error
        raise CommTimeout(f"rank 0 did not open {place} within {timeout_s:g} s", [0]) from error
    prefixed = _c10d.PrefixStore(group.name, store)
    prefixed.set(f"joined/{rank}", b"1")
    missing = _ranks_not_joined(prefixed, world_size, timeout_s)
    if missing:
        raise CommTimeout(f"{describe_ranks(missing)} did not join within {timeout_s:g} s", missing)
    return prefixed


def _ranks_not_joined(store: Any, world_size: int, timeout_s: float) -> list[int]:
    deadline = time.monotonic() + timeout_s
    missing: list[int] = []
    for peer in range(world_size):
        remaining = timedelta(seconds=max(0.01, deadline - time.monotonic()))
        try:
            has_joined = _has_key(store, f"joined/{peer}", remaining)
        except _c10d.DistNetworkError:
            # Rank 0 has given up first, and the store went with it.
            return [*missing, peer]
        if not has_joined:
            missing.append(peer)
    return missing


def _process_group(store: Any, group: GroupId, rank: int, world_size: int, timeout_s: float) -> Any:
    options = _c10d.ProcessGroupGloo._Options()
    local_address = _address_towards(group.host, group.port)
    options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=local_address)]
    options._timeout = timedelta(seconds=timeout_s + _GLOO_MARGIN_SECONDS)
    options._threads = 1
    try:
        return _c10d.ProcessGroupGloo(store, rank, world_size, options)
    except RuntimeError as error:
        raise CommError(f"gloo could not connect the ranks at {local_address}: {error}") from error


def _has_key(store: Any, key: str, limit: timedelta) -> bool:
    try:
        store.wait([key], limit)
    except _c10d.DistStoreError:
        return False
    return True


def _address_towards(host: str, port: int) -> str:
    """The address of this host's interface that routes to `host` (no packet is sent)."""
    with socket.socket(_family(host), socket.SOCK_DGRAM) as sock:
        sock.connect((host, port))
        return str(sock.getsockname()[0])


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
