"""`lockstep bench first-token`: the way of a first token, with simulated ranks of known step times.

A request of 128 ids, alone and amid 64 decoding streams, through client, frontend, coordinator,
worker and back. The floor is one step alone, and amid others a step and half the one that runs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import uvloop

from bench.cases import PROMPT_TOKENS, Subject
from bench.cli import add_record_flags, comma_separated, record_folder, say
from bench.load_cases import arrival
from bench.record import Case, Record, command_line, report, settings
from bench.requests import Client
from bench.server_process import ServerProcess
from lockstep.daemon.flags import float_between

_START_LIMIT_S = 120.0
_STREAM_S_AN_ARRIVAL = 0.05


def main(argv: list[str]) -> int:
    """Parses, measures, reports; returns the exit code."""
    options = _parser().parse_args(argv)
    measured = [case for step_ms in options.step_ms for case in _at(step_ms, options)]
    record = Record(
        bench="first-token",
        command=command_line("lockstep", "bench", "first-token", *argv),
        server_command=command_line("lockstep", "simulate", *_flags(options.step_ms[0], options)),
        config=settings(options),
        cases=measured,
    )
    report(record, options.model.name, record_folder(options))
    return 0


def _at(step_ms: float, options: argparse.Namespace) -> list[Case]:
    """The cases with steps of so many milliseconds."""
    flags = _flags(step_ms, options)
    with ServerProcess(flags, _START_LIMIT_S, subcommand="simulate") as server:
        cases = uvloop.run(_measure(server.address, step_ms, options))
    return [
        replace(case, floor=step_ms if case.batch_size == 1 else 1.5 * step_ms) for case in cases
    ]


async def _measure(address: str, step_ms: float, options: argparse.Namespace) -> list[Case]:
    config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    client = Client(address)
    subject = Subject(
        client=client,
        model=options.model.name,
        tp=options.ranks,
        dtype="none",
        vocab_size=config["vocab_size"],
        floor_ms=None,
        has_peer=False,
        generator=random.Random(0),
        say=say,
    )
    try:
        stream_tokens = min(
            int(_STREAM_S_AN_ARRIVAL * (options.arrivals + 40) / step_ms * 1e3),
            config["max_position_embeddings"] - PROMPT_TOKENS,
        )
        cases = await arrival(subject, options.arrivals, stream_tokens)
    finally:
        await client.close()
    return [replace(case, case=f"step{step_ms:g}ms-{case.case}") for case in cases]


def _flags(step_ms: float, options: argparse.Namespace) -> list[str]:
    return [
        *("--model", str(options.model), "--tp", str(options.ranks)),
        *("--step-ms", f"{step_ms:g}", "--prefill-us", "0"),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep bench first-token", allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="folder of a tokenizer")
    parser.add_argument(
        "--step-ms",
        type=comma_separated(float_between(1.0, 60_000.0)),
        default=[1.0, 5.0, 10.0],
        help="milliseconds, 1 or more",
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--arrivals", type=int, default=100, help="requests of each case")
    add_record_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
