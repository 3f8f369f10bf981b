"""The contract every backend keeps, and the checks they share.

One aliasing rule holds everywhere: `all_reduce` and `broadcast` work in place and return their
argument; `all_gather` writes `out`, which may not overlap its input; `all_reduce_add_rms_norm`
updates the residual in place and returns a new tensor. Tensors are contiguous.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tpcomm.records import Recorded

REDUCIBLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64)
DEFAULT_STAGING_BYTES = 4 << 20


AddRmsNorm = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class ReduceOp(enum.IntEnum):
    SUM = 0
    MAX = 1


@dataclass
class OpStats:
    """Calls of one operation by this rank, and the bytes of its input tensors."""

    calls: int = 0
    bytes: int = 0

    def add(self, num_bytes: int) -> None:
        self.calls += 1
        self.bytes += num_bytes


@dataclass
class CommStats:
    """Counts since the communicator was made. Replays of a captured graph are not seen here.

    `seconds` is the time spent in them, waiting for peers included; None where the backend does
    not measure it, as on GPUs. Written by the thread that issues collectives; other threads may
    read slightly old figures.
    """

    all_reduce: OpStats = field(default_factory=OpStats)
    all_gather: OpStats = field(default_factory=OpStats)
    broadcast: OpStats = field(default_factory=OpStats)
    barrier: OpStats = field(default_factory=OpStats)
    seconds: float | None = None


class Communicator(Protocol):
    """Collectives over `world_size` ranks.

    All ranks issue the same operations with the same shapes and dtypes in the same order, each
    from one thread. On CUDA they are ordered by the current stream; on CPU the call returns when
    this rank's result is complete. Every rank gets the same bits. A tensor of no elements is
    returned as it is, without a message.
    """

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def stats(self) -> CommStats: ...

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        """Combine `tensor` (any shape; fp32, fp16, bf16, int32 or int64) over ranks, IN PLACE.

        Raises:
            ValueError: dtype, layout or device is not what the backend takes.
            CommTimeout, CommAborted: ranks did not arrive, or the group was aborted.
        """
        ...

    def all_gather(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """Return `[world_size, *tensor.shape]`, row r being rank r's tensor; any dtype.

        `out`, when given, is filled and returned; it may not overlap `tensor`.
        """
        ...

    def all_reduce_add_rms_norm(
        self,
        tensor: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        add_rms_norm: AddRmsNorm = ...,
    ) -> Tensor:
        """Sum `tensor` over ranks, add it to `residual` IN PLACE, return the RMS norm of that.

        tensor, residual [num_tokens, hidden_size], weight [hidden_size], one float dtype. The
        result is a new tensor, the same bits on every rank; `tensor` is left undefined.
        `add_rms_norm(sum, residual, weight, eps)` does the second half where the backend has no
        kernel for it, as on CPU; by default the reference in tpcomm.norm_kernel.
        """
        ...

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Overwrite `tensor` (any dtype) with the root's, IN PLACE."""
        ...

    def barrier(self, timeout_s: float) -> None:
        """Return once every rank has called; CommTimeout after `timeout_s` seconds."""
        ...

    def recorded(self) -> Recorded:
        """The last collectives of this rank and totals of all; replays of graphs too.

        From any thread, also while a collective hangs; it takes at most about a second. What an
        abort has freed looks as if it had ended: read before aborting.

        Raises:
            CommTimeout: a device did not answer in that time.
        """
        ...

    def abort(self) -> None:
        """Give up, from any thread: collectives that hang raise CommAborted. Never blocks."""
        ...

    def close(self) -> None:
        """Release everything; a collective unless the communicator has failed. Idempotent."""
        ...


def check_layout(tensor: Tensor, device: torch.device) -> None:
    """Refuse a tensor that is elsewhere or not contiguous."""
    if tensor.device != device:
        raise ValueError(f"tensor is on {tensor.device}, the communicator on {device}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"tensor of shape {tuple(tensor.shape)} has strides {tensor.stride()}; "
            "collectives take contiguous tensors: call .contiguous()"
        )


def check_reducible(tensor: Tensor) -> None:
    """Refuse a dtype that `all_reduce` does not define."""
    if tensor.dtype not in REDUCIBLE_DTYPES:
        raise ValueError(
            f"all_reduce of {tensor.dtype}: takes {', '.join(map(str, REDUCIBLE_DTYPES))}"
        )


def check_root(root: int, world_size: int) -> None:
    if not 0 <= root < world_size:
        raise ValueError(f"broadcast root {root} is outside 0..{world_size - 1}")


def gather_output(tensor: Tensor, out: Tensor | None, world_size: int) -> Tensor:
    """The checked `out` of an all_gather, allocated when the caller gave none."""
    shape = (world_size, *tensor.shape)
    if out is None:
        return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    if tuple(out.shape) != shape or out.dtype != tensor.dtype:
        raise ValueError(
            f"all_gather out is {tuple(out.shape)} {out.dtype}, needs {shape} {tensor.dtype}"
        )
    check_layout(out, tensor.device)
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    if out.data_ptr() < end and begin < out.data_ptr() + out.nbytes:
        raise ValueError("all_gather out overlaps its input; give it memory of its own")
    return out


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bytes, `[tensor.nbytes]` uint8, sharing its memory."""
    return tensor.view(-1).view(torch.uint8)


def describe_ranks(ranks: Sequence[int]) -> str:
    """`rank 2` or `ranks 1, 2`, for messages."""
    names = ", ".join(map(str, ranks))
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"
