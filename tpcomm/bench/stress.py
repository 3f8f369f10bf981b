"""Thousands of replays of a graph that mixes all kernels, with random inputs and late ranks."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from tpcomm import norm_kernel
from tpcomm.bench.cases import Row, need_staging
from tpcomm.bench.rank_pool import RankContext
from tpcomm.communicator import ReduceOp
from tpcomm.graph_timer import wait_idle

_BANK = 16  # inputs of every rank, drawn beforehand
_EPS = 1e-5
_LIMIT_S = 30.0
_CHECK_EVERY = 500
_SIZES = ((4096, torch.bfloat16), (333, torch.float16), (100_003, torch.float32))
_LARGE = 300_000
_HIDDEN = 2048


class _Reduction:
    """One all-reduce in the graph: takes input `index`, counts elements unlike the reference."""

    def __init__(
        self, context: RankContext, num_elements: int, dtype: torch.dtype, two_shot: bool
    ) -> None:
        staging = need_staging(context)
        generator = torch.Generator(context.device).manual_seed(num_elements)  # alike on all ranks
        shape = (_BANK, context.world_size, num_elements)
        bank = torch.randn(shape, device=context.device, generator=generator).to(dtype)
        total = bank[:, 0].float()
        for peer in range(1, context.world_size):
            total = total + bank[:, peer].float()
        self._mine = bank[:, context.rank].contiguous()
        self._expected = total.to(dtype)
        self._call = staging.two_shot if two_shot else staging.one_shot

    def enqueue(self, index: Tensor, wrong: Tensor) -> None:
        tensor = self._mine.index_select(0, index)[0]
        self._call(tensor, ReduceOp.SUM)
        wrong += (tensor != self._expected.index_select(0, index)[0]).sum()


class _Norm:
    """One fused kernel beside an all-reduce and a norm of the same input."""

    def __init__(self, context: RankContext) -> None:
        self._staging = need_staging(context)
        shape = (_BANK, 3, _HIDDEN)
        self._mine = torch.randn(shape, device=context.device).bfloat16()
        self._weight = torch.ones(_HIDDEN, dtype=torch.bfloat16, device=context.device)

    def enqueue(self, index: Tensor, wrong: Tensor) -> None:
        x = self._mine.index_select(0, index)[0]
        first, second = torch.ones_like(x), torch.ones_like(x)
        fused = self._staging.all_reduce_add_rms_norm(x, first, self._weight, _EPS)
        self._staging.one_shot(x, ReduceOp.SUM)
        plain = norm_kernel.add_rms_norm(x, second, self._weight, _EPS)
        wrong += (fused != plain).sum() + (first != second).sum()


class _Gather:
    def __init__(self, context: RankContext) -> None:
        self._staging = need_staging(context)
        self._context = context

    def enqueue(self, index: Tensor, wrong: Tensor) -> None:
        world_size, rank = self._context.world_size, self._context.rank
        source = (index * 1000 + rank).expand(65).contiguous()
        out = torch.empty((world_size, 65), dtype=source.dtype, device=source.device)
        self._staging.all_gather(source, out)
        expected = index * 1000 + torch.arange(world_size, device=source.device)
        wrong += (out != expected[:, None]).sum()


def replay_with_late_ranks(context: RankContext, num_replays: int) -> Row:
    """How many elements were wrong over all replays, and how many collectives ran."""
    wrong = torch.zeros((), dtype=torch.int64, device=context.device)
    index = torch.zeros(1, dtype=torch.int64, device=context.device)
    parts = [_Reduction(context, n, dtype, two) for n, dtype in _SIZES for two in (False, True)]
    parts.append(_Reduction(context, _LARGE, torch.bfloat16, True))
    steps: list[_Reduction | _Norm | _Gather] = [*parts, _Norm(context), _Gather(context)]
    random.Random(3).shuffle(steps)  # alike on all ranks

    def body() -> None:
        for place, step in enumerate(steps):
            if place % context.world_size == context.rank:
                torch.cuda._sleep(3000)  # type: ignore[no-untyped-call]
            step.enqueue(index, wrong)
        index.add_(7).remainder_(_BANK)

    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        body()
        wait_idle(_LIMIT_S, "the first round")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            body()
        late = random.Random(context.rank)
        for replay in range(num_replays):
            if late.random() < 0.3:
                torch.cuda._sleep(late.randrange(200_000))  # type: ignore[no-untyped-call]
            graph.replay()
            if replay % _CHECK_EVERY == 0:
                wait_idle(_LIMIT_S, f"replay {replay}")
        wait_idle(_LIMIT_S, "the last replay")
    collectives = num_replays * (len(steps) + 1)
    return {"replays": num_replays, "collectives": collectives, "wrong": int(wrong)}
