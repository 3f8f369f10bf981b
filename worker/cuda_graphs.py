"""Decode steps as captured CUDA graphs: a ladder of batch sizes that share one memory pool."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from tpcomm import Communicator
from worker.model_runner import ModelRunner, StepTensors
from worker.sampling_params import SamplePlan, SampleVariant

T = TypeVar("T")

# The choices that nearly all traffic makes; a step that needs another one runs its sampling eagerly
# after the captured forward pass.
CAPTURED_PLANS = (
    SamplePlan(SampleVariant.LOCAL_BEST, all_greedy=True),
    SamplePlan(SampleVariant.LOCAL_BEST),
    # One constrained row among many others: the others must not notice.
    SamplePlan(SampleVariant.LOCAL_BEST, with_mask=True),
)


def captured_plan(plan: SamplePlan) -> SamplePlan:
    """The captured plan that does what `plan` asks, or `plan` itself."""
    needs_more = plan.with_penalties or plan.with_logprobs or plan.with_bias or plan.with_bad_words
    if plan.variant is not SampleVariant.LOCAL_BEST or needs_more:
        return plan
    if plan.with_mask:
        return CAPTURED_PLANS[2]
    return CAPTURED_PLANS[0] if plan.all_greedy else CAPTURED_PLANS[1]


@dataclass(frozen=True)
class Captured(Generic[T]):
    """A graph, what it leaves at fixed addresses, and the all-reduces it holds."""

    graph: torch.cuda.CUDAGraph
    result: T
    num_all_reduces: int


class GraphPool:
    """Captures calls into one memory pool and replays them. Used by the device thread alone.

    Capture is collective where the call is: every rank captures the same calls in the same order.
    A replay writes where the capture's result lies, and memory that an earlier graph's temporaries
    used; results that must last are copied out on the same stream.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._pool = torch.cuda.graph_pool_handle()
        self.num_replayed_all_reduces = 0  # which the communicator cannot see

    def capture(self, call: Callable[[], T]) -> Captured[T]:
        """Runs `call` once eagerly (kernels compile, NCCL connects), then captures it."""
        call()
        torch.cuda.synchronize()
        issued = self._comm.stats.all_reduce.calls
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = call()
        return Captured(graph, result, self._comm.stats.all_reduce.calls - issued)

    def replay(self, captured: Captured[T]) -> T:
        """Enqueues a captured call; returns what it will have written."""
        captured.graph.replay()
        self.num_replayed_all_reduces += captured.num_all_reduces
        return captured.result


def decode_ladder(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, rising; the last covers `max_num_seqs`."""
    ladder = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 1, 32)]
    sizes = [size for size in ladder if size < max_num_seqs]
    return [*sizes, max_num_seqs]


class DecodeGraphs:
    """Forward and sampling graphs per padded batch size."""

    def __init__(self, runner: ModelRunner, pool: GraphPool, max_num_seqs: int) -> None:
        self._runner = runner
        self._pool = pool
        self.sizes = decode_ladder(max_num_seqs)
        self._forward: dict[int, Captured[Tensor]] = {}
        self._choose: dict[tuple[int, SamplePlan], Captured[StepTensors]] = {}

    def capture(self) -> None:
        """Captures every size, largest first so that the pool is sized once."""
        for size in reversed(self.sizes):
            self._capture(size)

    def step(self, num_rows: int, plan: SamplePlan) -> StepTensors:
        """Runs one decode step over rows 0..num_rows-1, padded to the next captured size."""
        size = self.sizes[bisect.bisect_left(self.sizes, num_rows)]
        logits = self._pool.replay(self._forward[size])
        choose = self._choose.get((size, captured_plan(plan)))
        if choose is None:
            return self._runner.decode_choose(logits[:num_rows], plan)
        return self._pool.replay(choose)

    def _capture(self, size: int) -> None:
        forward = self._pool.capture(lambda: self._runner.decode_forward(size))
        self._forward[size] = forward
        for plan in CAPTURED_PLANS:
            self._choose[size, plan] = self._capture_choose(forward.result, plan)

    def _capture_choose(self, logits: Tensor, plan: SamplePlan) -> Captured[StepTensors]:
        return self._pool.capture(lambda: self._runner.decode_choose(logits, plan))
