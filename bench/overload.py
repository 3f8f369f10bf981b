"""`lockstep bench overload`: ten times more than the server can take.

Sustainable is the highest open-loop rate without a refusal. Then the same server gets 0.8 and 10
times that. What is accepted under overload must be served about as well as without; every refusal
must name a delay; memory must stay; and afterwards the server must be idle and well.

Two settings bound what the accepted wait for, and are chosen for the model and the prompts: a step
has room for one prompt beside the rows that decode, which bounds the gaps, and the limit on the
predicted wait is about one such step, which bounds the time to the first token.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import uvloop

from bench.cli import add_record_flags, record_folder, say
from bench.daemons import children, resident_bytes, scrape, start_group, total
from bench.histogram import p99
from bench.open_loop import Arrivals, OpenLoop, Outcomes
from bench.record import Case, Record, command_line, report, settings

_START_LIMIT_S = 300.0
_IDLE_LIMIT_S = 30.0
_UP, _DOWN = 1.5, 1.25  # factors of the search's rates, in short runs and in whole ones


@dataclass(frozen=True)
class Served:
    """A running coordinator: where, and the processes whose memory is watched."""

    address: str
    metrics: str
    pids: list[int]

    def resident(self) -> int:
        """Bytes, of engine and frontends."""
        return sum(resident_bytes(pid) for pid in self.pids)


def main(argv: list[str]) -> int:
    """Parses, measures, reports; returns 1 if something did not hold."""
    options = _parser().parse_args(argv)
    worker_flags, coordinator_flags = _flags(options)
    with ExitStack() as stack:
        served = _start(stack, options, worker_flags, coordinator_flags)
        figures, problems = uvloop.run(_measure(served, options))
    for problem in problems:
        say(f"NOT HELD: {problem}")
    record = Record(
        bench="overload",
        command=command_line("lockstep", "bench", "overload", *argv),
        server_command=command_line("python", "-m", "coordinator", *coordinator_flags),
        config=settings(options, problems=problems),
        cases=[_case(options, *figure) for figure in figures],
    )
    report(record, options.model.name, record_folder(options))
    return 1 if problems else 0


def _flags(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    common = ["--model", str(options.model), "--port", "0", "--metrics-port", "0"]
    coordinator = [*common, "--dtype", "float32", "--max-num-seqs", str(options.max_num_seqs)]
    coordinator += ["--max-queue-requests", str(options.max_queue_requests)]
    coordinator += ["--max-model-len", "1024", "--kv-cache-bytes", options.kv_cache_bytes]
    coordinator += ["--max-queue-time", str(options.max_queue_time)]
    # One prompt a step beside all that decode: the gaps under overload are those without it.
    coordinator += ["--max-batch-tokens", str(options.max_num_seqs + options.prompt_tokens)]
    return [*common, "--num-threads", str(options.num_threads)], coordinator


def _start(
    stack: ExitStack, options: argparse.Namespace, worker_flags: list[str], flags: list[str]
) -> Served:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    workers = [("worker", worker_flags)] * options.tp
    ready = start_group(stack, folder, workers, flags, _START_LIMIT_S).coordinator
    return Served(ready.grpc, ready.metrics, [ready.pid, *children(ready.pid)])


class _Runs:
    """Runs of one server, no two with the same prompts: the prefix cache has none of them."""

    def __init__(self, loop: OpenLoop, options: argparse.Namespace) -> None:
        self._loop = loop
        self._options = options
        self._num_runs = 0

    async def run(self, rate: float, seconds: float, stop_at_refusal: bool = False) -> Outcomes:
        """Requests at `rate` a second; says what became of them."""
        options = self._options
        self._num_runs += 1
        arrivals = Arrivals(
            rate=rate,
            seconds=seconds,
            prompt_tokens=options.prompt_tokens,
            output_tokens=options.output_tokens,
            vocab_size=options.vocab_size,
            deadline_s=options.deadline,
            seed=self._num_runs,
        )
        outcomes = await self._loop.run(arrivals, stop_at_refusal)
        say(f"{rate:.2f} req/s for {outcomes.seconds:.0f} s: {_summary(outcomes)}")
        return outcomes

    async def sustainable(self) -> tuple[float, Outcomes]:
        """The highest rate of a ladder without a refusal over the whole time, and that run."""
        options = self._options
        rate = options.first_rate
        while _is_clean(await self.run(rate * _UP, options.search_seconds, stop_at_refusal=True)):
            rate *= _UP
        while not _is_clean(full := await self.run(rate, options.seconds, stop_at_refusal=True)):
            rate /= _DOWN
        return float(rate), full


def _is_clean(outcomes: Outcomes) -> bool:
    return not outcomes.num_refused and not outcomes.others


async def _measure(
    served: Served, options: argparse.Namespace
) -> tuple[list[tuple[str, str, float]], list[str]]:
    """Figures (name, unit, value) and what did not hold."""
    loop = OpenLoop(served.address)
    runs = _Runs(loop, options)
    try:
        await runs.run(options.first_rate, options.search_seconds)  # the server learns its times
        rate, full = await runs.sustainable()
        normal = await runs.run(0.8 * rate, options.normal_seconds)
        before = served.resident()
        flooded = await runs.run(10 * rate, options.seconds)
    finally:
        await loop.close()
    grown_mb = (served.resident() - before) / 1e6
    idle = _wait_idle(served)
    figures = [
        ("sustainable-rate", "req/s", rate),
        *_latencies("normal", normal),
        *_latencies("overload", flooded),
        ("sustainable-goodput", "tok/s", full.goodput),
        ("overload-goodput", "tok/s", flooded.goodput),
        ("overload-refused", "requests", flooded.num_refused),
        ("overload-refused-after-p99", "ms", 1e3 * p99(flooded.refused_after)),
        ("overload-finished", "requests", flooded.num_finished),
        ("memory-growth", "MB", grown_mb),
    ]
    return figures, _problems(normal, full, flooded, grown_mb, idle)


def _latencies(name: str, outcomes: Outcomes) -> list[tuple[str, str, float]]:
    """What the clients saw, and of the time to the first token what the server says of it."""
    parts = (
        ("ttft", outcomes.first),
        ("queue", outcomes.in_queue),
        ("prefill", outcomes.in_prefill),
        ("gap", outcomes.longest_gaps),
    )
    return [(f"{name}-{part}-p99", "ms", 1e3 * p99(values)) for part, values in parts]


def _problems(
    normal: Outcomes, full: Outcomes, flooded: Outcomes, grown_mb: float, idle: str
) -> list[str]:
    checks = (
        (not flooded.others, f"calls ended in {flooded.others}"),
        (flooded.num_refused > 0, "nothing was refused: this was no overload"),
        (
            flooded.num_refused_without_delay == 0,
            f"{flooded.num_refused_without_delay} refusals without a retry delay",
        ),
        (p99(flooded.first) <= 1.5 * p99(normal.first), "p99 ttft above 1.5x that at 0.8 load"),
        (
            p99(flooded.longest_gaps) <= 1.5 * p99(normal.longest_gaps),
            "p99 gap above 1.5x that at 0.8 load",
        ),
        (flooded.goodput >= 0.9 * full.goodput, "goodput below 0.9x the sustainable one"),
        (grown_mb < 50, f"memory grew by {grown_mb:.0f} MB"),
        (not idle, idle),
    )
    return [text for holds, text in checks if not holds]


def _wait_idle(served: Served) -> str:
    """Why the server is not idle after a while; empty if it is.

    An idle engine audits its blocks, slots and rows once a second and ends if they do not add up.
    """
    deadline = time.monotonic() + _IDLE_LIMIT_S
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    while True:
        samples = scrape(served.metrics)
        busy = {name: total(samples, f"lockstep_{name}") for name in names}
        if not any(busy.values()):
            return ""
        if time.monotonic() > deadline:
            return f"not idle after {_IDLE_LIMIT_S:g} s: {busy}"
        time.sleep(0.2)


def _summary(outcomes: Outcomes) -> str:
    latencies = ", ".join(f"{name[1:]} {value:.0f}" for name, _, value in _latencies("", outcomes))
    return (
        f"{outcomes.num_finished} finished, {outcomes.num_refused} refused, {outcomes.others or ''}"
        f" {outcomes.goodput:.0f} tok/s; ms: {latencies}"
    )


def _case(options: argparse.Namespace, name: str, unit: str, value: float) -> Case:
    return Case(
        case=f"overload-{name}",
        model=options.model.name,
        tp=options.tp,
        dtype="float32",
        batch_size=options.max_num_seqs,
        context=options.prompt_tokens + options.output_tokens,
        metric=name,
        unit=unit,
        value=value,
        runs=[value],
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep bench overload", allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=49152, help="of the random prompts")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--max-queue-requests", type=int, default=4)
    parser.add_argument("--max-queue-time", type=float, default=0.25, help="predicted, seconds")
    parser.add_argument("--num-threads", type=int, default=1, help="of each rank")
    parser.add_argument("--kv-cache-bytes", default="256M")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--first-rate", type=float, default=0.5, help="requests a second")
    parser.add_argument("--search-seconds", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument(
        "--normal-seconds", type=float, default=120.0, help="at 0.8 load: few come, p99 wants many"
    )
    parser.add_argument("--deadline", type=float, default=60.0, help="of each call, seconds")
    add_record_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
