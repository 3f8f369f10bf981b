"""More ranks than GPUs: virtual ranks as streams of one GPU, for correctness only.

Their kernels wait for each other, so all must run at once: messages are small, every kernel is
loaded before the first wait, and each stream needs a hardware queue of its own
(CUDA_DEVICE_MAX_CONNECTIONS). Where the device runs them one after another, the abort word frees
them and the report says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from tpcomm import norm_kernel
from tpcomm.allreduce_kernels import one_shot_all_reduce, two_shot_all_reduce, two_shot_bytes
from tpcomm.bench.rank_pool import RankContext
from tpcomm.communicator import ReduceOp
from tpcomm.errors import CommTimeout
from tpcomm.gather_kernel import small_all_gather
from tpcomm.graph_timer import wait_for
from tpcomm.norm_kernel import fused_launch
from tpcomm.staging_tables import StagingTables, make_tables, staging_size

_SLOT_BYTES = 256 << 10
_LIMIT_S = 5.0
_EPS = 1e-5
_CALLS = 5  # more than the buffers that alternate
# Whole vectors and ragged sizes, every float. Each rank's kernels are compiled for it alone, so
# that all combinations would take minutes at 8 ranks.
_SIZES = {torch.bfloat16: (7, 4096, 10_001), torch.float16: (4096,), torch.float32: (10_001,)}


class VirtualRanks:
    """Tables and a stream for each of `world_size` ranks on one device."""

    def __init__(self, world_size: int, device: torch.device) -> None:
        self.world_size = world_size
        self._memory = torch.full(
            (world_size, staging_size(world_size, _SLOT_BYTES)),
            0xFF,
            dtype=torch.uint8,
            device=device,
        )
        bases = torch.tensor([row.data_ptr() for row in self._memory], device=device)
        self.tables: list[StagingTables] = [
            dataclasses.replace(make_tables(world_size, rank, _SLOT_BYTES, device), bases=bases)
            for rank in range(world_size)
        ]
        self._streams = [_new_stream(device) for _ in range(world_size)]
        self._device = device

    def run(self, fill: Callable[[], object], call: Callable[[int, StagingTables], object]) -> None:
        """`fill()` the inputs, then `call(rank, tables)` for all ranks at once.

        `call` allocates nothing. CommTimeout if the ranks do not get through.
        """
        self._load(call)
        fill()
        torch.cuda.synchronize(self._device)
        events = []
        for rank, stream in enumerate(self._streams):
            with torch.cuda.stream(stream):
                call(rank, self.tables[rank])
                events.append(stream.record_event())
        try:
            for rank, event in enumerate(events):
                wait_for(event, _LIMIT_S, f"virtual rank {rank} of {self.world_size}")
        except CommTimeout:
            self._set_abort(1)
            torch.cuda.synchronize(self._device)
            raise

    def _load(self, call: Callable[[int, StagingTables], object]) -> None:
        """Compile and load the kernels by a run in which nobody waits, then wipe its traces."""
        self._set_abort(1)
        for rank, tables in enumerate(self.tables):
            call(rank, tables)
        torch.cuda.synchronize(self._device)
        self._set_abort(0)
        self._memory.fill_(0xFF)
        for tables in self.tables:
            tables.state.zero_()
        torch.cuda.synchronize(self._device)

    def _set_abort(self, value: int) -> None:
        stream = _new_stream(self._device)
        with torch.cuda.stream(stream):
            for tables in self.tables:
                tables.abort_word.fill_(value)
        stream.synchronize()


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def check_virtual_ranks(context: RankContext, world_size: int) -> str:
    """What is wrong among `world_size` virtual ranks on this rank's GPU; empty if nothing is."""
    if context.rank != 0:
        return ""
    ranks = VirtualRanks(world_size, context.device)
    generator = torch.Generator(context.device).manual_seed(11)
    for dtype, sizes in _SIZES.items():
        for num_elements in sizes:
            shape = (world_size, num_elements)
            parts = torch.randn(shape, device=context.device, generator=generator).to(dtype)
            for call in (one_shot_all_reduce, two_shot_all_reduce):
                fits = two_shot_bytes(parts[0], world_size) <= _SLOT_BYTES
                if call is two_shot_all_reduce and not fits:
                    continue
                wrong = _check_sum(ranks, call, parts)
                if wrong:
                    return f"{call.__name__} of {num_elements} {dtype}: {wrong}"
    return _check_norm(ranks, context.device) or _check_gather(ranks, context.device)


def _in_order(parts: Tensor) -> Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts.dtype)


def _check_sum(ranks: VirtualRanks, call: Callable[..., Tensor], parts: Tensor) -> str:
    work = parts[None].repeat(_CALLS, 1, 1)

    def reduce(rank: int, tables: StagingTables) -> None:
        for repeat in range(_CALLS):
            call(work[repeat, rank], ReduceOp.SUM, tables)

    ranks.run(lambda: work.copy_(parts.expand_as(work)), reduce)
    wrong = int((work != _in_order(parts)).sum())
    return f"{wrong} elements wrong" if wrong else ""


def _check_norm(ranks: VirtualRanks, device: torch.device) -> str:
    shape = (ranks.world_size, 5, 1024)
    parts = torch.randn(shape, device=device).bfloat16()
    residuals, outs = torch.zeros_like(parts), torch.zeros_like(parts)
    weight = torch.ones(1024, dtype=torch.bfloat16, device=device)

    def fused(rank: int, tables: StagingTables) -> None:
        for _ in range(_CALLS):
            fused_launch(parts[rank], residuals[rank], weight, outs[rank], _EPS, tables).run()

    ranks.run(residuals.zero_, fused)
    total, residual = _in_order(parts), torch.zeros_like(parts[0])
    for _ in range(_CALLS):
        out = norm_kernel.add_rms_norm(total, residual, weight, _EPS)
    wrong = int((residuals != residual).sum() + (outs != out).sum())
    return f"fused kernel: {wrong} elements wrong" if wrong else ""


def _check_gather(ranks: VirtualRanks, device: torch.device) -> str:
    sources = torch.arange(ranks.world_size * 512, device=device).view(ranks.world_size, 512)
    outs = torch.zeros((ranks.world_size, *sources.shape), dtype=sources.dtype, device=device)

    def gather(rank: int, tables: StagingTables) -> None:
        for _ in range(_CALLS):
            small_all_gather(sources[rank], outs[rank], tables)

    ranks.run(outs.zero_, gather)
    wrong = int((outs != sources).sum())
    return f"all-gather: {wrong} elements wrong" if wrong else ""
