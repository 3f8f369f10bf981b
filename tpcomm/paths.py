"""The ways a communicator can carry an all-reduce, as preflight sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tpcomm.communicator import ReduceOp


@dataclass(frozen=True)
class CommPath:
    """One way, callable by itself.

    all_reduce: in place, like Communicator.all_reduce.
    device: where its tensors live.
    max_bytes: the largest message it takes; 0 for any.
    absent: why the way does not exist in this group; the rest is unused then.
    prepare: compiles or allocates for a tensor, outside the time limit.
    wait: returns once what was enqueued is done; CommTimeout after so many seconds.
    rescue: frees what hangs after `wait` timed out, without harm to other ways.
    switch_off: takes the way out of use on this rank, for the reason given.
    """

    name: str
    device: torch.device
    all_reduce: Callable[[Tensor, ReduceOp], Tensor] | None
    max_bytes: int = 0
    absent: str = ""
    prepare: Callable[[Tensor, ReduceOp], None] | None = None
    wait: Callable[[float], None] | None = None
    rescue: Callable[[float], None] | None = None
    switch_off: Callable[[str], None] | None = None


@runtime_checkable
class HasPaths(Protocol):
    """A communicator that `preflight` can check."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...

    def paths(self) -> list[CommPath]:
        """The ways an all_reduce may take; the backend's own comes last."""
        ...
