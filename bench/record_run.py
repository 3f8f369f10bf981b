"""`lockstep bench record`: every figure of one TP degree, in one go and under one limit.

Each step is a process of its own with a limit; one that fails or runs out of time is named, and the
rest goes on. Each keeps its own record in bench/results.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.cli import add_record_flags, comma_separated, say
from bench.daemons import end_process

_ROOT = Path(__file__).resolve().parents[1]
_STOP_S = 20.0
_MODELS = {
    1: ["qwen3-0.6b", "llama-3.1-8b", "qwen3-14b"],
    2: ["llama-3.1-8b", "qwen3-14b"],
    4: ["llama-3.1-8b", "qwen3-32b", "llama-3.1-70b"],
}


@dataclass(frozen=True)
class Step:
    """A command, and the most seconds it may take."""

    name: str
    command: Sequence[str]
    limit_s: float


@dataclass(frozen=True)
class Outcome:
    """`result` is `ok`, `failed`, `out of time` or `not begun`."""

    name: str
    result: str
    seconds: float


def main(argv: list[str]) -> int:
    """Runs the steps, prints a table and, last, one JSON line; 1 if a step did not end well."""
    options = _parser().parse_args(argv)
    outcomes = run_steps(steps_of(options), options.limit_s)
    for outcome in outcomes:
        print(f"{outcome.name:<24} {outcome.result:<12} {outcome.seconds:6.0f} s")
    line = {"bench": "record", "tp": options.tp, "steps": [asdict(one) for one in outcomes]}
    print(json.dumps(line), flush=True)
    return int(any(outcome.result != "ok" for outcome in outcomes))


def steps_of(options: argparse.Namespace) -> list[Step]:
    """What is run, in order: what must be right before what is to be fast."""
    kept = ["--dry-run"] if options.dry_run else ["--results", str(options.results)]
    steps = []
    if not options.on_cpu:
        tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_generate.py"]
        steps.append(Step("same tokens", [*tests, "-k", f"[{options.tp}]"], 180.0))
        if options.tp > 1:
            collectives = ["-m", "tpcomm.bench", "--world", str(options.tp), "--limit-s", "110"]
            if not options.dry_run:
                collectives += ["--json", str(_collectives_file(options))]
            sections = ["preflight", "time", "torch", "fused", "gather", "stress", "check"]
            steps.append(Step("collectives", [*collectives, *sections], 120.0))
    for model in options.models or _MODELS.get(options.tp, []):
        serving = ["-m", "bench", "serving", "--model", model, "--tp", str(options.tp), "--quick"]
        steps.append(
            Step(f"serving {model}", [*serving, *shlex.split(options.serving_flags), *kept], 240.0)
        )
    return steps


def _collectives_file(options: argparse.Namespace) -> Path:
    options.results.mkdir(parents=True, exist_ok=True)
    day = time.strftime("%Y-%m-%d", time.gmtime())
    return Path(options.results) / f"tpcomm_tp{options.tp}_{day}.json"


def run_steps(steps: Sequence[Step], limit_s: float) -> list[Outcome]:
    """One after the other; those that the whole limit leaves no time for are not begun."""
    deadline = time.monotonic() + limit_s
    outcomes = []
    for step in steps:
        left_s = min(step.limit_s, deadline - time.monotonic())
        if left_s <= 0:
            outcomes.append(Outcome(step.name, "not begun", 0.0))
            continue
        say(f"record: {step.name}, at most {left_s:.0f} s")
        begun = time.monotonic()
        result = _run(step.command, left_s)
        outcomes.append(Outcome(step.name, result, round(time.monotonic() - begun, 1)))
    return outcomes


def _run(command: Sequence[str], limit_s: float) -> str:
    """The child stops its own children when it is asked to; it is killed if it does not."""
    process = subprocess.Popen([sys.executable, *command], cwd=_ROOT, stdout=sys.stderr)
    try:
        return "failed" if process.wait(timeout=limit_s) else "ok"
    except subprocess.TimeoutExpired:
        end_process(process, _STOP_S)
        return "out of time"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep bench record", description=__doc__)
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--limit-s", type=float, default=720.0, help="of all steps together")
    parser.add_argument("--models", type=comma_separated(str), default=[], help="instead of ours")
    parser.add_argument("--on-cpu", action="store_true", help="leave out what needs GPUs")
    parser.add_argument("--serving-flags", default="", help="more flags for `bench serving`")
    add_record_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
