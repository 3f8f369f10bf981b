"""The one form in which every benchmark reports: a table for people, a JSON line for machines."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

_PROJECT = Path(__file__).resolve().parent.parent
RESULTS = _PROJECT / "bench" / "results"
_PROBE_LIMIT_S = 60


@dataclass(frozen=True)
class Case:
    """One figure: the median `value` of `runs`, in `unit`, beside the peer's and the floor."""

    case: str
    model: str
    tp: int
    dtype: str
    batch_size: int
    context: int
    metric: str
    unit: str
    value: float
    runs: list[float]
    peer: dict[str, Any] | None = None
    floor: float | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run of a benchmark, as kept in bench/results.

    Hardware and versions are those of this process unless more is known of them, which takes a GPU.
    """

    bench: str
    command: str
    server_command: str
    hardware: dict[str, Any] = field(default_factory=lambda: hardware())
    versions: dict[str, Any] = field(default_factory=lambda: versions({}))
    anchor: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any]
    cases: list[Case]
    schema: int = 1
    time_utc: str = field(
        default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    )
    commit: str = field(default_factory=lambda: _commit(os.environ))
    dirty: bool | None = field(default_factory=lambda: _is_dirty())


def command_line(*words: str) -> str:
    """The words as one would type them in the project's folder.

    Its own paths are relative, others (a checkpoint's folder) are shown by their last part, and
    --results is left out: it says where a record lies, and not what was measured.
    """
    shown: list[str] = []
    remaining = iter(words)
    for word in remaining:
        if word == "--results":
            next(remaining, None)
        elif not word.startswith("--results="):
            shown.append(_placeless(word))
    return shlex.join(shown)


def settings(options: argparse.Namespace, **more: object) -> dict[str, Any]:
    """`options` and `more` for a record's `config`: paths as `command_line` shows them."""
    values = {**vars(options), **more}
    values.pop("results", None)
    return {
        name: _placeless(str(value)) if isinstance(value, str | Path) else value
        for name, value in values.items()
    }


def _placeless(word: str) -> str:
    inside = word.removeprefix(f"{_PROJECT}{os.sep}")
    return Path(inside).name if os.path.isabs(inside) else inside


def report(record: Record, model: str, folder: Path | None, shown: str = "") -> None:
    """Prints the table and, last, the JSON line; keeps the line in `folder` unless it is None.

    `shown` is printed in the table's place. An existing file is never overwritten: the next of the
    same name gets a number.
    """
    print(shown or table(record.cases))
    line = json.dumps(asdict(record))
    if folder is not None:
        gpu = str(record.hardware["gpu"]).replace("NVIDIA ", "").replace(" ", "-").lower()
        name = (
            f"{record.bench}_{gpu}x{record.hardware['gpus']}_{model}"
            f"_{record.time_utc[:10]}_{record.commit[:8]}"
        )
        folder.mkdir(parents=True, exist_ok=True)
        with _new_file(folder, name) as file:
            file.write(line + "\n")
    print(line, flush=True)


def _new_file(folder: Path, name: str) -> TextIO:
    for number in itertools.count(1):
        suffix = f"_{number}" if number > 1 else ""
        with suppress(FileExistsError):
            return (folder / f"{name}{suffix}.json").open("x", encoding="utf-8")
    raise AssertionError("numbers end")


def table(cases: list[Case]) -> str:
    """The cases as an aligned table: ours, the peer's, how many times better we are, the floor."""
    rows = [("case", "model", "tp", "ours", "peer", "ratio", "floor", "unit")]
    for case in cases:
        peer = case.peer["value"] if case.peer else None
        faster = "-"
        if peer:
            better_is_less = not case.unit.endswith("/s")
            faster = f"{peer / case.value if better_is_less else case.value / peer:.2f}x"
        rows.append(
            (
                case.case,
                case.model,
                str(case.tp),
                f"{case.value:.4g}",
                f"{peer:.4g}" if peer else "-",
                faster,
                f"{case.floor:.3g}" if case.floor else "-",
                case.unit,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def hardware() -> dict[str, Any]:
    """GPU, count and driver by nvidia-smi (none without it), CPU and the cores we may use."""
    gpus = _nvidia_smi()
    return {
        "gpu": gpus[0][0] if gpus else "cpu",
        "gpus": len(gpus) or 1,
        "driver": gpus[0][1] if gpus else None,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
    }


def versions(torch_facts: dict[str, Any]) -> dict[str, Any]:
    """Versions of what matters; `torch_facts` are what the anchor process read from torch."""
    found: dict[str, Any] = {"python": platform.python_version(), **torch_facts}
    for package in ("torch", "triton", "grpcio", "protobuf", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _nvidia_smi() -> list[tuple[str, str]]:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_LIMIT_S, check=True
        ).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []
    pairs = [line.split(",") for line in output.splitlines() if line.strip()]
    return [(name.strip(), driver.strip()) for name, driver in pairs]


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit(environ: Mapping[str, str]) -> str:
    """$BENCH_COMMIT, which says that this is a clean copy of that commit; else what is checked out,
    or "unknown"."""
    return environ.get("BENCH_COMMIT") or _git("rev-parse", "HEAD") or "unknown"


def _is_dirty() -> bool | None:
    """Whether the checkout differs from its commit; None, nobody knows, without one."""
    if os.environ.get("BENCH_COMMIT"):
        return False
    if not _git("rev-parse", "HEAD"):
        return None
    return bool(_git("status", "--porcelain"))


def _git(*arguments: str) -> str:
    """Output of a git command in the project; nothing without git or outside a checkout."""
    command = ["git", "-C", str(_PROJECT), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_LIMIT_S, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
