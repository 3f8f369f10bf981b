"""`lockstep bench trace`: which kernels a decode step spends its time in, and how long it waits.

The daemons run as they serve; rank 0 records its GPU while a batch decodes. Of the last recorded
steps: the share of time in which some kernel ran, and each kernel's part.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from bench.cli import add_record_flags, comma_separated, model_dir, record_folder
from bench.daemons import start_group
from bench.record import Case, Record, command_line, hardware, report, settings, versions
from bench.requests import Request, random_prompt, request_message
from protos.lockstep.v1 import generate_pb2_grpc

_START_LIMIT_S = 300.0
_TRACE_LIMIT_S = 120.0
_WARM_UP_S = 2.0
_PROMPT_TOKENS = 128
_MAX_STEPS = 200
_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_NAME_WIDTH = 68
_MIN_SHARE = 0.003  # of a step


@dataclass(frozen=True)
class Span:
    """One kernel's run, microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class StepTrace:
    """Means over whole decode steps. `kernels`: name -> (calls, microseconds) a step."""

    num_steps: int
    step_us: float
    busy_share: float
    kernels: dict[str, tuple[float, float]]


def main(argv: list[str]) -> int:
    """Parses, records, reports; returns the exit code."""
    options = _parser().parse_args(argv)
    model = model_dir(options.model)
    vocab_size = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    max_tokens = options.max_model_len - _PROMPT_TOKENS
    generator = random.Random(0)
    cases: list[Case] = []
    lines: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        address, pid = _start(stack, folder, model, options)
        for number, batch_size in enumerate(options.batch_sizes):
            path = folder / f"{number}.json"
            requests = [
                Request(random_prompt(generator, _PROMPT_TOKENS, vocab_size), max_tokens)
                for _ in range(batch_size)
            ]
            trace = read_trace(_record(address, pid, path, requests))
            lines += _table(batch_size, trace)
            cases += _cases(model.name, options, batch_size, trace)
    record = Record(
        bench="trace",
        command=command_line("lockstep", "bench", "trace", *argv),
        server_command="python -m coordinator and python -m worker, one a rank; rank 0 records",
        hardware=hardware(),
        versions=versions({}),
        anchor={},
        config=settings(options),
        cases=cases,
    )
    results = record_folder(options)
    report(record, f"{model.name}-tp{options.tp}", results, shown="\n".join(lines))
    return 0


def _start(
    stack: ExitStack, folder: Path, model: Path, options: argparse.Namespace
) -> tuple[str, int]:
    """The public API's address and the process id of rank 0."""
    common = ["--model", str(model), "--port", "0", "--metrics-port", "0"]
    workers = [("worker", [*common, "--device", f"cuda:{rank}"]) for rank in range(options.tp)]
    traced = [str(folder), str(options.seconds), *workers[0][1]]
    workers[0] = ("bench.traced_worker", traced)
    flags = [*common, "--load-format", "dummy", "--drain-seconds", "1"]
    flags += ["--max-model-len", str(options.max_model_len)]
    group = start_group(stack, folder, workers, flags, _START_LIMIT_S)
    return group.coordinator.grpc, group.workers[0].pid


def _record(address: str, pid: int, path: Path, requests: list[Request]) -> Path:
    """Decodes a batch, has rank 0 record amid it, and ends the batch; returns the trace."""
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        stub = generate_pb2_grpc.GenerateServiceStub(channel)
        calls = [
            stub.Generate(request_message(request), timeout=_TRACE_LIMIT_S + _START_LIMIT_S)
            for request in requests
        ]
        for call in calls:  # the first delta of each: from then on all decode
            while next(call).WhichOneof("event") != "delta":
                pass
        time.sleep(_WARM_UP_S)
        os.kill(pid, signal.SIGUSR1)
        deadline = time.monotonic() + _TRACE_LIMIT_S
        while not path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank 0 has left no trace after {_TRACE_LIMIT_S:g} s")
            time.sleep(0.1)
        for call in calls:
            call.cancel()
    return path


def read_trace(path: Path) -> StepTrace:
    """What a Chrome trace of a decoding rank says of its last steps.

    A step begins with the embedding's kernel. Raises ValueError if no whole step is in it.
    """
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    spans = sorted((_span(event) for event in events if _is_work(event)), key=lambda s: s.start)
    starts = [span.start for span in spans if "embedding" in span.name][-_MAX_STEPS - 1 :]
    if len(starts) < 2:
        raise ValueError(f"{path} holds {len(spans)} kernels and no whole decode step")
    inside = [span for span in spans if starts[0] <= span.start < starts[-1]]
    num_steps = len(starts) - 1
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for span in inside:
        totals[span.name][0] += 1 / num_steps
        totals[span.name][1] += (span.end - span.start) / num_steps
    window = starts[-1] - starts[0]
    return StepTrace(
        num_steps,
        window / num_steps,
        _union(inside) / window,
        {name: (calls, us) for name, (calls, us) in totals.items()},
    )


def _is_work(event: dict[str, Any]) -> bool:
    return event.get("ph") == "X" and event.get("cat") in _GPU_WORK


def _span(event: dict[str, Any]) -> Span:
    return Span(event["name"], event["ts"], event["ts"] + event["dur"])


def _union(spans: list[Span]) -> float:
    """Length of the union of intervals that are sorted by start."""
    total, reached = 0.0, float("-inf")
    for span in spans:
        total += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return total


def _table(batch_size: int, trace: StepTrace) -> list[str]:
    calls = sum(calls for calls, _ in trace.kernels.values())
    lines = [
        f"bs {batch_size}: {trace.step_us:.0f} us a step over {trace.num_steps} steps, kernels run "
        f"{100 * trace.busy_share:.1f}% of the time, {calls:.0f} kernels a step"
    ]
    for name, (calls, us) in _main_kernels(trace):
        share = 100 * us / trace.step_us
        lines.append(f"  {us:8.1f} us {share:5.1f}% {calls:6.1f}x  {name[:_NAME_WIDTH]}")
    return lines


def _main_kernels(trace: StepTrace) -> list[tuple[str, tuple[float, float]]]:
    """The kernels that matter, largest first, and all others together."""
    by_time = sorted(trace.kernels.items(), key=lambda item: -item[1][1])
    main = [item for item in by_time if item[1][1] >= _MIN_SHARE * trace.step_us]
    rest = [value for _, value in by_time[len(main) :]]
    return [*main, ("others", (sum(calls for calls, _ in rest), sum(us for _, us in rest)))]


def _cases(
    model: str, options: argparse.Namespace, batch_size: int, trace: StepTrace
) -> list[Case]:
    figures = [("step", "us", trace.step_us), ("busy", "%", 100 * trace.busy_share)]
    figures += [(name, "us", us) for name, (_, us) in _main_kernels(trace)]
    return [
        Case(
            case=f"trace-bs{batch_size}-{name}",
            model=model,
            tp=options.tp,
            dtype="bfloat16",
            batch_size=batch_size,
            context=_PROMPT_TOKENS,
            metric=name,
            unit=unit,
            value=value,
            runs=[value],
        )
        for name, unit, value in figures
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep bench trace", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="a name in bench/models, or a folder")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--batch-sizes", type=comma_separated(int), default=[1, 64, 256])
    parser.add_argument("--max-model-len", type=int, default=10240)
    parser.add_argument("--seconds", type=float, default=1.2, help="recorded, per batch size")
    add_record_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
