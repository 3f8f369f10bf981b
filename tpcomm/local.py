"""A group of one rank: every collective is the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcomm.communicator import (
    AddRmsNorm,
    CommStats,
    ReduceOp,
    check_layout,
    check_reducible,
    check_root,
    gather_output,
)
from tpcomm.errors import CommAborted, CommError
from tpcomm.norm_kernel import add_rms_norm_reference
from tpcomm.paths import CommPath
from tpcomm.records import Recorded


class LocalCommunicator:
    """world_size 1 on any device. Checks its arguments exactly as the other backends do."""

    def __init__(self, device: torch.device) -> None:
        self.rank = 0
        self.world_size = 1
        self.stats = CommStats(seconds=0.0 if device.type == "cpu" else None)
        self._device = device
        self._aborted = False
        self._closed = False

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        self._check(tensor)
        check_reducible(tensor)
        self.stats.all_reduce.add(tensor.nbytes)
        return tensor

    def all_gather(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        self._check(tensor)
        out = gather_output(tensor, out, 1)
        self.stats.all_gather.add(tensor.nbytes)
        out[0].copy_(tensor)
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

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        self._check(tensor)
        check_root(root, 1)
        self.stats.broadcast.add(tensor.nbytes)
        return tensor

    def barrier(self, timeout_s: float) -> None:
        self._check_open()
        self.stats.barrier.add(0)

    def paths(self) -> list[CommPath]:
        """This backend's only way."""
        return [CommPath("local", self._device, self.all_reduce)]

    def recorded(self) -> Recorded:
        """Nothing: there is nobody to wait for."""
        return Recorded()

    def abort(self) -> None:
        self._aborted = True

    def close(self) -> None:
        self._closed = True

    def _check(self, tensor: Tensor) -> None:
        self._check_open()
        check_layout(tensor, self._device)

    def _check_open(self) -> None:
        if self._aborted:
            raise CommAborted("the communicator was aborted")
        if self._closed:
            raise CommError("the communicator is closed")
