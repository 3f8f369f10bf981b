"""`lockstep bench control-plane`: what the coordinator costs, with simulated workers.

Real coordinator, real frontends, real TCP to every rank; only the model is replaced by a clock. For
each number of running sequences, step time and number of ranks: the share of time in which rank 0
had nothing to do, CPU of engine and frontends, and what the clients saw. Detokenising is on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cli import add_record_flags, comma_separated, record_folder, say
from bench.daemons import children, cpu_seconds, scrape, start_group, total
from bench.histogram import LogHistogram
from bench.record import Case, Record, command_line, report, settings

_START_LIMIT_S = 120.0
_CLIENT_MARGIN_S = 60.0
_PROMPT_TOKENS = 64
_HEADER = (
    " rows  step ranks  idle%  steps/s    tok/s  engine frontend     gap p50/p99     lag p50/p99"
    "    tok\n"
    "         ms                                us/step   us/tok              ms              ms"
    "   /msg"
)


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    rows: int
    step_ms: float
    ranks: int

    @property
    def name(self) -> str:
        return f"rows{self.rows}-step{self.step_ms:g}ms-ranks{self.ranks}"


@dataclass(frozen=True)
class Group:
    """A running coordinator and its simulated ranks."""

    address: str
    engine_pid: int
    metrics: str


@dataclass(frozen=True)
class Reading:
    """Counters at one moment."""

    at: float
    engine_cpu_s: float
    frontend_cpu_s: float
    idle_s: float
    num_steps: float
    num_tokens: float


def main(argv: list[str]) -> int:
    """Parses, measures, reports; returns the exit code."""
    options = _parser().parse_args(argv)
    cases: list[Case] = []
    lines = [_HEADER]
    for rows, step_ms, ranks in itertools.product(options.rows, options.step_ms, options.ranks):
        setting = Setting(rows, step_ms, ranks)
        figures = _measure(setting, options)
        say(f"{setting.name}: " + ", ".join(f"{k} {v:.4g}" for k, (_, v) in figures.items()))
        cases += _cases(setting, options, figures)
        lines.append(_line(setting, figures))
    record = Record(
        bench="control-plane",
        command=command_line("lockstep", "bench", "control-plane", *argv),
        server_command="python -m coordinator and python -m worker.simulated, one a rank",
        config=settings(options),
        cases=cases,
    )
    report(record, options.model.name, record_folder(options), shown="\n".join(lines))
    return 0


def _line(setting: Setting, figures: dict[str, tuple[str, float]]) -> str:
    value = {name: number for name, (_, number) in figures.items()}
    return (
        f"{setting.rows:5d} {setting.step_ms:5g} {setting.ranks:5d}"
        f" {value['worker_idle_share']:6.1f} {value['steps']:8.0f} {value['tokens']:8.0f}"
        f" {value['engine_cpu_per_step']:8.0f} {value['frontend_cpu_per_token']:8.1f}"
        f" {value['gap_p50']:7.1f} {value['gap_p99']:7.1f} {value['lag_p50']:7.1f}"
        f" {value['lag_p99']:7.1f} {value['tokens_per_message']:7.2f}"
    )


def _measure(setting: Setting, options: argparse.Namespace) -> dict[str, tuple[str, float]]:
    """Figures by name: (unit, value)."""
    with _running(setting, options) as group:
        clients = [
            _start_clients(group, setting, options, index) for index in range(options.processes)
        ]
        try:
            time.sleep(options.warm_up)
            before = _read(group)
            time.sleep(options.seconds)
            after = _read(group)
            seen = [_finish(client, options) for client in clients]
        finally:
            for client in clients:
                client.kill()
                client.wait()
    return {**_server_figures(before, after), **_client_figures(seen)}


@contextmanager
def _running(setting: Setting, options: argparse.Namespace) -> Iterator[Group]:
    coordinator_cores, other_cores = _split_cores(options.coordinator_cores)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        common = ["--model", str(options.model), "--port", "0", "--metrics-port", "0"]
        worker_flags = ["--step-ms", str(setting.step_ms), "--vocab-size", str(options.vocab_size)]
        worker_flags += ["--num-blocks", "200000", "--token-text", "clock"]
        workers = [("worker.simulated", [*common, *worker_flags])] * setting.ranks
        flags = [*common, "--max-model-len", "4096"]
        flags += ["--max-num-seqs", str(setting.rows), "--num-frontends", str(options.frontends)]
        flags += ["--max-batch-tokens", str(max(2048, setting.rows)), "--drain-seconds", "1"]
        ready = start_group(
            stack, folder, workers, flags, _START_LIMIT_S, coordinator_cores, other_cores
        ).coordinator
        yield Group(ready.grpc, ready.pid, ready.metrics)


def _split_cores(num_for_coordinator: int) -> tuple[set[int] | None, set[int] | None]:
    """Cores of the coordinator and those of everything else; None where they are shared.

    The coordinator gets one thread of each of its cores, and nobody the others.
    """
    if not num_for_coordinator:
        return None, None
    cores = _cores()
    if num_for_coordinator >= len(cores):
        raise SystemExit(
            f"--coordinator-cores {num_for_coordinator}: this host has {len(cores)} cores, and the"
            " clients need some; 0 shares them all"
        )
    own, others = cores[:num_for_coordinator], cores[num_for_coordinator:]
    return {min(threads) for threads in own}, {cpu for threads in others for cpu in threads}


def _cores() -> list[frozenset[int]]:
    """The hardware threads of each core that this process may use."""
    usable = os.sched_getaffinity(0)
    cores: dict[str, set[int]] = {}
    for cpu in sorted(usable):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        name = siblings.read_text() if siblings.exists() else str(cpu)
        cores.setdefault(name, set()).add(cpu)
    return [frozenset(threads) for threads in cores.values()]


def _start_clients(
    group: Group, setting: Setting, options: argparse.Namespace, index: int
) -> subprocess.Popen[str]:
    num_clients = max(options.clients, setting.rows)
    share = len(range(index, num_clients, options.processes))
    command = [sys.executable, "-m", "bench.stream_clients", group.address]
    command += ["--streams", str(share), "--seed", str(index)]
    command += ["--vocab-size", str(options.vocab_size)]
    command += ["--clock-modulus", str(options.vocab_size)]
    command += ["--warm-up", str(options.warm_up), "--seconds", str(options.seconds)]
    command += ["--prompt-tokens", str(_PROMPT_TOKENS), "--max-tokens", str(options.max_tokens)]
    _, cores = _split_cores(options.coordinator_cores)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if cores:
        os.sched_setaffinity(process.pid, cores)
    return process


def _finish(client: subprocess.Popen[str], options: argparse.Namespace) -> dict[str, Any]:
    output, _ = client.communicate(timeout=options.warm_up + _CLIENT_MARGIN_S)
    if client.returncode:
        raise RuntimeError(f"a client process ended with exit code {client.returncode}")
    seen: dict[str, Any] = json.loads(output.splitlines()[-1])
    return seen


def _read(group: Group) -> Reading:
    samples = scrape(group.metrics)
    return Reading(
        at=time.monotonic(),
        engine_cpu_s=cpu_seconds(group.engine_pid),
        frontend_cpu_s=sum(cpu_seconds(pid) for pid in children(group.engine_pid)),
        idle_s=sum(v for k, v in samples.items() if _is_idle_of_rank_0(k)),
        num_steps=total(samples, "lockstep_steps_total"),
        num_tokens=total(samples, "lockstep_generation_tokens_total"),
    )


def _is_idle_of_rank_0(key: str) -> bool:
    return key.startswith("lockstep_worker_idle_seconds_total{") and 'rank="0"' in key


def _server_figures(before: Reading, after: Reading) -> dict[str, tuple[str, float]]:
    seconds = after.at - before.at
    steps = max(after.num_steps - before.num_steps, 1)
    tokens = max(after.num_tokens - before.num_tokens, 1)
    engine_us = (after.engine_cpu_s - before.engine_cpu_s) * 1e6
    frontend_us = (after.frontend_cpu_s - before.frontend_cpu_s) * 1e6
    return {
        "worker_idle_share": ("%", 100 * (after.idle_s - before.idle_s) / seconds),
        "steps": ("1/s", steps / seconds),
        "tokens": ("tok/s", tokens / seconds),
        "engine_cpu_per_step": ("us", engine_us / steps),
        "engine_cpu_per_token": ("us", engine_us / tokens),
        "frontend_cpu_per_token": ("us", frontend_us / tokens),
        "engine_core_share": ("%", engine_us / seconds / 1e4),
    }


def _client_figures(seen: list[dict[str, Any]]) -> dict[str, tuple[str, float]]:
    gaps, first = LogHistogram(), LogHistogram()
    windows: list[LogHistogram] = []
    for process in seen:
        gaps.merge(LogHistogram(process["gaps"]))
        first.merge(LogHistogram(process["first"]))
        for index, counts in enumerate(process["lags"]):
            if index == len(windows):
                windows.append(LogHistogram())
            windows[index].merge(LogHistogram(counts))
    lags = LogHistogram()
    for window in windows:
        lags.merge(window)
    messages = max(sum(process["num_messages"] for process in seen), 1)
    tokens = sum(process["num_tokens"] for process in seen)
    return {
        "gap_p50": ("ms", gaps.quantile(0.5) * 1e3),
        "gap_p99": ("ms", gaps.quantile(0.99) * 1e3),
        "lag_p50": ("ms", lags.quantile(0.5) * 1e3),
        "lag_p99": ("ms", lags.quantile(0.99) * 1e3),
        "lag_p99_first_window": ("ms", windows[0].quantile(0.99) * 1e3 if windows else 0.0),
        "lag_p99_last_window": ("ms", _last_full(windows) * 1e3),
        "ttft_p50": ("ms", first.quantile(0.5) * 1e3),
        "tokens_per_message": ("tok", tokens / messages),
    }


def _last_full(windows: list[LogHistogram]) -> float:
    """p99 of the last window that is not a stub."""
    full = [w for w in windows if w.total * 2 >= max(other.total for other in windows)]
    return full[-1].quantile(0.99) if full else 0.0


def _cases(
    setting: Setting, options: argparse.Namespace, figures: dict[str, tuple[str, float]]
) -> list[Case]:
    return [
        Case(
            case=f"{setting.name}-{name}",
            model=options.model.name,
            tp=setting.ranks,
            dtype="none",
            batch_size=setting.rows,
            context=_PROMPT_TOKENS + options.max_tokens,
            metric=name,
            unit=unit,
            value=value,
            runs=[value],
        )
        for name, (unit, value) in figures.items()
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep bench control-plane", allow_abbrev=False)
    parser.add_argument(
        "--model", type=Path, required=True, help="folder with tokenizer and config"
    )
    parser.add_argument("--vocab-size", type=int, default=49152, help="of that tokenizer")
    parser.add_argument(
        "--rows", type=comma_separated(int), default=[1, 64, 256, 1024], help="running"
    )
    parser.add_argument("--step-ms", type=comma_separated(float), default=[1.0, 2.0, 5.0])
    parser.add_argument("--ranks", type=comma_separated(int), default=[1, 4, 8])
    parser.add_argument("--clients", type=int, default=1000, help="connected, at least the rows")
    parser.add_argument("--processes", type=int, default=8, help="that the clients are spread over")
    parser.add_argument("--frontends", type=int, default=2)
    parser.add_argument("--coordinator-cores", type=int, default=4, help="0: share all")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--warm-up", type=float, default=5.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=20.0, help="measured")
    add_record_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
