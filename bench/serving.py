"""`lockstep bench serving`: starts a server, measures the cases through its public API, records."""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import uvloop

from bench import cases, load_cases
from bench.cases import Subject
from bench.cli import add_record_flags, comma_separated, model_dir, record_folder, say
from bench.daemons import scrape
from bench.peer import PEER_GPU
from bench.record import (
    Case,
    Record,
    command_line,
    hardware,
    report,
    settings,
    versions,
)
from bench.requests import Client
from bench.server_process import ServerProcess


def main(argv: list[str]) -> int:
    """Parses, measures, reports; returns the exit code."""
    options = _parser().parse_args(argv)
    folder = model_dir(options.model)
    anchor = json.loads(
        subprocess.run(
            [sys.executable, "-m", "bench.anchor"],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        ).stdout
    )
    flags = [
        *("--model", str(folder), "--tp", str(options.tp), "--load-format", options.load_format),
        *("--max-model-len", str(options.max_model_len), "--max-num-seqs", "256"),
        *("--dtype", options.dtype, *shlex.split(options.server_flags)),
    ]
    with ServerProcess(flags, options.start_limit) as server:
        say(f"server ready at {server.address} after {server.start_seconds:.1f} s")
        phases = startup_phases(scrape(server.metrics))
        say(f"of that, in seconds: {phases}")
        measured = uvloop.run(
            _measure(options, folder, server.address, anchor["anchor"]["mv_tb_s"])
        )
    record = Record(
        bench="serving",
        command=command_line("lockstep", "bench", "serving", *argv),
        server_command=command_line("lockstep", "serve", *flags),
        hardware=hardware(),
        versions=versions(anchor["facts"]),
        anchor=anchor["anchor"],
        config=settings(options, startup_s=round(server.start_seconds, 2), startup_phases_s=phases),
        cases=measured,
    )
    report(record, f"{folder.name}-tp{options.tp}", record_folder(options))
    return 0


def startup_phases(samples: dict[str, float]) -> dict[str, float]:
    """Seconds by phase, of the coordinator's metrics."""
    pattern = re.compile(r'lockstep_startup_seconds\{.*phase="(\w+)"')
    found = ((pattern.match(name), value) for name, value in samples.items())
    return {match[1]: round(value, 2) for match, value in found if match}


async def _measure(
    options: argparse.Namespace, folder: Path, address: str, read_tb_s: float | None
) -> list[Case]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    client = Client(address)
    subject = Subject(
        client=client,
        model=folder.name,
        tp=options.tp,
        dtype=options.dtype,
        vocab_size=config["vocab_size"],
        floor_ms=weight_read_ms(config, options.tp, read_tb_s) if read_tb_s else None,
        has_peer=hardware()["gpu"] == PEER_GPU,
        generator=random.Random(options.seed),
        say=say,
    )
    try:
        return await _run_cases(options, subject)
    finally:
        await client.close()


async def _run_cases(options: argparse.Namespace, subject: Subject) -> list[Case]:
    measured = []
    if "decode" in options.cases:
        for batch_size in options.batch_sizes:
            measured += await cases.decode(subject, batch_size, options.quick)
    if "ttft" in options.cases:
        for length in options.lengths:
            measured.append(await cases.ttft(subject, length, options.quick))
    if "offline256" in options.cases:
        measured.append(await cases.offline(subject))
    if "context" in options.cases:
        for batch_size in options.context_batch_sizes:
            measured.append(await load_cases.context(subject, batch_size, options.quick))
    if "arrival" in options.cases:
        measured += await load_cases.arrival(subject)
    if "serving" in options.cases:
        for rate in options.rates:
            measured += await load_cases.serving(subject, rate, options.serving_seconds)
    return measured


def weight_read_ms(config: dict[str, Any], tp: int, read_tb_s: float) -> float:
    """Milliseconds to read one rank's bfloat16 weights once; the input embedding is not read.

    `read_tb_s` is what this GPU reads, in TB/s, as `bench.anchor` measures it.
    """
    hidden, head_dim = config["hidden_size"], config.get("head_dim")
    head_dim = head_dim or hidden // config["num_attention_heads"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * hidden * config["intermediate_size"]
    parameters = config["num_hidden_layers"] * layer + config["vocab_size"] * hidden
    return float(2 * parameters / tp / (read_tb_s * 1e12) * 1e3)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep bench serving", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="a name in bench/models, or a folder")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--max-model-len", type=int, default=10240)
    parser.add_argument(
        "--cases",
        type=comma_separated(str),
        default=["decode", "ttft", "offline256"],
        help="of decode, ttft, offline256, context, arrival, serving",
    )
    parser.add_argument("--batch-sizes", type=comma_separated(int), default=[1, 8, 64, 256])
    parser.add_argument("--lengths", type=comma_separated(int), default=[128, 1024, 8192])
    parser.add_argument("--context-batch-sizes", type=comma_separated(int), default=[1, 16])
    parser.add_argument("--rates", type=comma_separated(float), default=[4.0, 8.0, 16.0])
    parser.add_argument("--serving-seconds", type=float, default=20.0, help="of each rate")
    parser.add_argument("--server-flags", default="", help="more flags for lockstep serve")
    parser.add_argument("--start-limit", type=float, default=300.0, help="seconds to become ready")
    parser.add_argument("--seed", type=int, default=None, help="of the random prompts")
    parser.add_argument("--quick", action="store_true", help="one repeat a case")
    add_record_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
