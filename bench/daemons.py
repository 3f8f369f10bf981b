"""Daemons for the length of a benchmark, started one by one so that cores can be assigned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.daemon_process import daemon_environ, python_module

_STOP_LIMIT_S = 15.0
_SCRAPE_LIMIT_S = 10.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Ready:
    """What a daemon wrote when it was ready."""

    pid: int
    grpc: str
    metrics: str


class Daemon:
    """`python -m MODULE ...` pinned to `cores`; None: wherever the kernel likes."""

    def __init__(
        self, module: str, flags: Sequence[str], ready_file: Path, cores: set[int] | None
    ) -> None:
        self._module = module
        self._ready_file = ready_file
        command = [*python_module(module), *flags, "--ready-file", str(ready_file)]
        environ = daemon_environ(os.environ)
        self._process = subprocess.Popen(command, stdout=sys.stderr, env=environ)
        if cores:
            # Threads and children that come later inherit it.
            os.sched_setaffinity(self._process.pid, cores)

    def ready(self, limit_s: float) -> Ready:
        """Waits until it serves; RuntimeError if it ends or takes longer."""
        deadline = time.monotonic() + limit_s
        while not self._ready_file.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self._module} is not ready after {limit_s:g} s"
                    f" (exit code {self._process.returncode})"
                )
            time.sleep(0.05)
        record = json.loads(self._ready_file.read_text(encoding="utf-8"))
        return Ready(record["pid"], record["grpc"], record["metrics"])

    def stop(self) -> None:
        """SIGTERM, then SIGKILL."""
        end_process(self._process, _STOP_LIMIT_S)


def end_process(process: subprocess.Popen[Any], limit_s: float) -> None:
    """Asks it to end, and kills it if it has not within the limit; nothing if it has ended."""
    process.terminate()
    try:
        process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=limit_s)


@dataclass(frozen=True)
class RunningGroup:
    """What a coordinator and its workers, in order of rank, wrote when they were ready."""

    coordinator: Ready
    workers: list[Ready]


def start_group(
    stack: ExitStack,
    folder: Path,
    workers: Sequence[tuple[str, Sequence[str]]],
    coordinator_flags: Sequence[str],
    limit_s: float,
    coordinator_cores: set[int] | None = None,
    worker_cores: set[int] | None = None,
) -> RunningGroup:
    """Starts a worker a rank, (module, flags) each, and a coordinator for them.

    `stack` stops them. Each is ready within `limit_s`; RuntimeError otherwise.
    """
    started = []
    for rank, (module, flags) in enumerate(workers):
        started.append(Daemon(module, flags, folder / f"worker{rank}.ready", worker_cores))
        stack.callback(started[-1].stop)
    ready = [worker.ready(limit_s) for worker in started]
    flags = [*coordinator_flags, "--workers", ",".join(worker.grpc for worker in ready)]
    coordinator = Daemon("coordinator", flags, folder / "coordinator.ready", coordinator_cores)
    stack.callback(coordinator.stop)
    return RunningGroup(coordinator.ready(limit_s), ready)


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, its ended children left out (proc(5), fields 14, 15)."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def children(pid: int) -> list[int]:
    """Its child processes, of all its threads."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # the thread has ended, and has no children
            found += map(int, (task / "children").read_text(encoding="ascii").split())
    return found


def resident_bytes(pid: int) -> int:
    """Memory that a process has resident (proc(5), VmRSS)."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(f"process {pid} has no memory")


def scrape(address: str) -> dict[str, float]:
    """A daemon's metrics by name and labels, as they stand in the text."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{address}/metrics", timeout=_SCRAPE_LIMIT_S) as response:
        text = response.read().decode("utf-8")
    samples = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            samples[name] = float(value)
    return samples


def total(samples: dict[str, float], name: str) -> float:
    """Sum over all label sets of a metric."""
    return sum(v for key, v in samples.items() if key == name or key.startswith(name + "{"))
