"""`lockstep bench kernels`: every CUDA kernel against its floor, and against torch.

The floor is max(bytes / measured memory bandwidth, FLOPs / measured matmul rate) of this GPU. Times
are of replayed CUDA graphs, so that they hold no launch from Python.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.cli import add_record_flags, model_dir, record_folder
from bench.kernel_cases import CaseBuilder, LayerShape, Work
from bench.record import (
    Case,
    Record,
    command_line,
    hardware,
    report,
    settings,
    versions,
)

_SHAPES = (("llama-3.1-8b", 1), ("llama-3.1-8b", 4), ("qwen3-0.6b", 1))
_ANCHOR_LIMIT_S = 120
_REPLAY_MS = 20.0


@dataclass(frozen=True)
class Rates:
    """What this GPU reaches, as `bench.anchor` measures it."""

    bytes_per_s: float
    flops_per_s: float

    def floor_us(self, work: Work) -> float:
        return 1e6 * max(work.num_bytes / self.bytes_per_s, work.num_flops / self.flops_per_s)


def main(argv: list[str]) -> int:
    """Parses, measures, reports; returns the exit code."""
    options = _parser().parse_args(argv)
    if not torch.cuda.is_available():
        print("lockstep bench kernels needs a CUDA GPU; torch finds none", file=sys.stderr)
        return 2
    anchor = _anchor()
    rates = Rates(anchor["anchor"]["mv_tb_s"] * 1e12, anchor["anchor"]["matmul_tflops"] * 1e12)
    device = torch.device("cuda", 0)
    cases: list[Case] = []
    for model, tp in _SHAPES:
        if options.model not in ("all", model):
            continue
        shape = LayerShape.of_config(model_dir(model) / "config.json", tp)
        for work in works(CaseBuilder(shape, device)):
            if options.only in work.case:
                cases.append(_measure(work, shape, rates, options.runs))
                print(_line(cases[-1]), file=sys.stderr, flush=True)
    record = Record(
        bench="kernels",
        command=command_line("lockstep", "bench", "kernels", *argv),
        server_command="",
        hardware=hardware(),
        versions=versions(anchor["facts"]),
        anchor=anchor["anchor"],
        config=settings(options),
        cases=cases,
    )
    report(record, options.model, record_folder(options))
    return 0


def works(builder: CaseBuilder) -> Iterator[Work]:
    """Built one at a time: the caches of two would not fit everywhere."""
    yield from builder.linears(16)
    for num_tokens in (1, 64, 256, 2048):
        yield from builder.row_kernels(num_tokens)
        yield from builder.linears(num_tokens)
    for num_rows, context in ((1, 1024), (1, 8192), (16, 8192), (64, 1024), (256, 1024)):
        yield builder.decode_attention(num_rows, context)
    for num_chunks, start, length in ((1, 0, 2048), (1, 0, 8192), (1, 6144, 2048), (16, 0, 128)):
        yield builder.prefill_attention(num_chunks, start, length)


def _measure(work: Work, shape: LayerShape, rates: Rates, num_runs: int) -> Case:
    runs = time_graph_us(work.calls, num_runs)
    peer = None
    if work.peer_calls:
        value = statistics.median(time_graph_us(work.peer_calls, num_runs))
        peer = {"name": work.peer_name, "value": value}
    return Case(
        case=f"{work.case} n={work.batch_size}" + (f" ctx={work.context}" if work.context else ""),
        model=shape.model,
        tp=shape.tp,
        dtype="bfloat16",
        batch_size=work.batch_size,
        context=work.context,
        metric="time",
        unit="us",
        value=statistics.median(runs),
        runs=runs,
        peer=peer,
        floor=rates.floor_us(work),
    )


def time_graph_us(calls: list[Callable[[], Tensor]], num_runs: int) -> list[float]:
    """Microseconds of one call, `num_runs` times, from a CUDA graph that holds all of them."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    num_replays = 1
    elapsed_ms = _elapsed_ms(graph, num_replays)
    num_replays = max(1, int(_REPLAY_MS / max(elapsed_ms, 1e-3)))
    _elapsed_ms(graph, num_replays)
    scale = 1e3 / (num_replays * len(calls))
    return [_elapsed_ms(graph, num_replays) * scale for _ in range(num_runs)]


def _elapsed_ms(graph: torch.cuda.CUDAGraph, num_replays: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(num_replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _anchor() -> dict[str, dict[str, float]]:
    """The anchor's own process prints one JSON object."""
    command = [sys.executable, "-m", "bench.anchor"]
    finished = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        timeout=_ANCHOR_LIMIT_S,
        check=True,
    )
    measured: dict[str, dict[str, float]] = json.loads(finished.stdout)
    return measured


def _line(case: Case) -> str:
    reached = f"{100 * case.floor / case.value:.0f}% of the floor's speed" if case.floor else ""
    return f"{case.model} tp{case.tp} {case.case}: {case.value:.1f} us, {reached}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep bench kernels", description=__doc__)
    models = sorted({model for model, _ in _SHAPES})
    parser.add_argument("--model", choices=["all", *models], default="all")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--runs", type=int, default=5, help="timings a case, median counts")
    add_record_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
