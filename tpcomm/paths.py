"""The ways a communicator can carry a collective, as preflight sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tpcomm.communicator import REDUCIBLE_DTYPES
from tpcomm.size_table import ALL_REDUCE, SizeTable


@dataclass(frozen=True)
class CommPath:
    """One way, callable by itself.

    call: by operation: all_reduce (tensor, op), in place; all_gather (tensor), a new tensor;
        all_reduce_add_rms_norm (tensor, residual, weight, eps), a new tensor.
    device: where its tensors live.
    max_bytes: the largest message it takes; 0 for any. Integers may take no more than a quarter.
    dtypes: what an all_reduce of it takes.
    absent: why the way does not exist in this group; the rest is unused then.
    prepare: takes what `call` takes; compiles or allocates for it, outside the time limit.
    wait: returns once what was enqueued is done; CommTimeout after so many seconds.
    rescue: frees what hangs after `wait` timed out, without harm to other ways.
    switch_off: takes the way out of use on this rank, for the reason given; `hung` if a call
        of it did not end on some rank.
    measure: microseconds per call of a function inside a graph, waiting at most so many seconds.
        Collective. None where there is nothing to choose between.
    """

    name: str
    device: torch.device
    call: Callable[..., Tensor] | None
    operation: str = ALL_REDUCE
    max_bytes: int = 0
    dtypes: Sequence[torch.dtype] = REDUCIBLE_DTYPES
    absent: str = ""
    prepare: Callable[..., object] | None = None
    wait: Callable[[float], None] | None = None
    rescue: Callable[[float], None] | None = None
    switch_off: Callable[[str, bool], None] | None = None
    measure: Callable[[Callable[[], object], float], float] | None = None


@runtime_checkable
class HasPaths(Protocol):
    """A communicator that `preflight` can check."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...

    def paths(self) -> list[CommPath]:
        """The ways collectives may take; the backend's own all-reduce comes last."""
        ...


@runtime_checkable
class HasTable(Protocol):
    """A communicator that chooses its paths by a table."""

    table: SizeTable
