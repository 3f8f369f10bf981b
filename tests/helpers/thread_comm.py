"""Ranks as threads of one process: tensor parallelism tested without starting processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from tpcomm import CommAborted, CommStats, OpStats, Recorded, ReduceOp
from tpcomm.communicator import AddRmsNorm
from tpcomm.norm_kernel import add_rms_norm_reference

T = TypeVar("T")
_TIMEOUT_S = 60.0


class ThreadGroup:
    """What the ranks of one group share."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size)
        self.tensors: list[Tensor] = [torch.empty(0)] * world_size


class ThreadCommunicator:
    """The Communicator contract, summing in rank order so that every rank has the same bits."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self._group = group
        self.rank = rank
        self.world_size = group.world_size
        self.stats = CommStats()

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        assert tensor.is_contiguous()
        parts = self._exchange(tensor, self.stats.all_reduce)
        combined = parts[0].clone()
        for part in parts[1:]:
            combined = combined + part if op is ReduceOp.SUM else torch.maximum(combined, part)
        self._wait()
        return tensor.copy_(combined)

    def all_gather(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        parts = self._exchange(tensor, self.stats.all_gather)
        gathered = torch.stack(parts)
        self._wait()
        return gathered if out is None else out.copy_(gathered)

    def all_reduce_add_rms_norm(
        self,
        tensor: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        add_rms_norm: AddRmsNorm = add_rms_norm_reference,
    ) -> Tensor:
        return add_rms_norm(self.all_reduce(tensor), residual, weight, eps)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        source = self._exchange(tensor, self.stats.broadcast)[root].clone()
        self._wait()
        return tensor.copy_(source)

    def barrier(self, timeout_s: float) -> None:
        self._group.barrier.wait(timeout_s)

    def recorded(self) -> Recorded:
        return Recorded()

    def abort(self) -> None:
        self._group.barrier.abort()

    def close(self) -> None:
        return

    def _exchange(self, tensor: Tensor, stats: OpStats) -> list[Tensor]:
        """Every rank's tensor, to be read before `_wait`."""
        stats.add(tensor.nbytes)
        self._group.tensors[self.rank] = tensor
        self._wait()
        parts = list(self._group.tensors)
        assert all(part.shape == tensor.shape for part in parts), [p.shape for p in parts]
        return parts

    def _wait(self) -> None:
        try:
            self._group.barrier.wait(_TIMEOUT_S)
        except threading.BrokenBarrierError:
            raise CommAborted(f"rank {self.rank}: another rank failed or is late") from None


def run_ranks(world_size: int, body: Callable[[ThreadCommunicator], T]) -> list[T]:
    """`body` once per rank, in threads; results by rank. The first rank's own error is raised."""
    group = ThreadGroup(world_size)
    comms = [ThreadCommunicator(group, rank) for rank in range(world_size)]

    def guarded(comm: ThreadCommunicator) -> Any:
        try:
            with torch.inference_mode():
                return body(comm)
        except BaseException:
            comm.abort()
            raise

    if world_size == 1:
        return [guarded(comms[0])]
    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(guarded, comm) for comm in comms]
    errors = [error for error in (future.exception() for future in futures) if error]
    causes = [error for error in errors if not isinstance(error, CommAborted)]
    for error in causes or errors:
        raise error
    return [future.result() for future in futures]
