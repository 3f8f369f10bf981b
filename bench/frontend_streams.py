"""`lockstep bench streams`: what a token costs a frontend process, and how late it arrives.

A real frontend process with a real tokenizer serves a client process; the engine behind it gives
every stream a token a step, and neither model nor ranks. Texts hold characters of several tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import uvloop
from tokenizers import Tokenizer

from bench.cli import add_record_flags, record_folder
from bench.record import (
    Case,
    Record,
    command_line,
    report,
    settings,
)
from bench.stream_engine import StreamEngine

_TEXT = (
    "The quick brown fox jumps over the lazy dog, and so on for a while. "
    "Ein Größenvergleich läßt sich leicht führen. 世界你好，今天天气很好。🙂🚀👩‍👩‍👧 done.\n"
)
_CLIENT_LIMIT_S = 120.0
# Steps before the measured ones: connections, caches and branch predictors warm up.
_WARM_UP = 0.2


@dataclass(frozen=True)
class Measured:
    """One case. Times of frontend CPU in seconds, lags [num_tokens] in seconds."""

    cpu_s: float
    num_tokens: int
    num_messages: int
    wall_s: float
    lags: np.ndarray


async def measure(model: Path, num_streams: int, num_steps: int, step_s: float) -> Measured:
    """Runs `num_streams` streams over a fresh frontend; the first fifth is not measured."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    token_ids = tokenizer.encode(_TEXT).ids
    async with StreamEngine(model, tokenizer.get_vocab_size()) as engine:
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.stream_reader", engine.address, str(num_streams)),
            stdout=subprocess.PIPE,
            limit=1 << 28,
        )
        assert client.stdout is not None
        async with asyncio.timeout(_CLIENT_LIMIT_S + num_steps * step_s):
            handles = await engine.accept(num_streams)
            assert await client.stdout.readline() == b"reading\n"
            num_warm = round(num_steps * _WARM_UP)
            warm = await engine.run_steps(handles, token_ids, num_warm, step_s)
            cpu_before = engine.cpu_seconds
            sent_at = await engine.run_steps(
                handles, token_ids[num_warm % len(token_ids) :] + token_ids, num_steps, step_s
            )
            cpu_s = engine.cpu_seconds - cpu_before
            engine.end(handles)
            arrivals = json.loads(await client.stdout.readline())
            await client.wait()
    return _measured(arrivals, np.array(warm + sent_at), num_warm, cpu_s)


def _measured(
    arrivals: list[list[tuple[float, int]]], sent_at: np.ndarray, num_warm: int, cpu_s: float
) -> Measured:
    lags, num_messages = [], 0
    for stream in arrivals:
        times, counts = np.array(stream).T
        # Token k came with the first message that brings more than k.
        came_with = np.searchsorted(counts, np.arange(num_warm, len(sent_at)), side="right")
        lags.append(times[came_with] - sent_at[num_warm:])
        num_messages += len(set(came_with.tolist()))
    all_lags = np.concatenate(lags)
    wall_s = float(sent_at[-1] - sent_at[num_warm])
    return Measured(cpu_s, len(all_lags), num_messages, wall_s, all_lags)


def _cases(measured: Measured, num_streams: int, model: str) -> list[Case]:
    figures = {
        "frontend CPU per token": ("us", measured.cpu_s / measured.num_tokens * 1e6),
        "frontend CPU per message": ("us", measured.cpu_s / measured.num_messages * 1e6),
        "frontend CPU share": ("cores", measured.cpu_s / measured.wall_s),
        "messages per token": ("1", measured.num_messages / measured.num_tokens),
        "token-to-client lag p50": ("ms", float(np.percentile(measured.lags, 50)) * 1e3),
        "token-to-client lag p99": ("ms", float(np.percentile(measured.lags, 99)) * 1e3),
    }
    return [
        Case(
            case=f"{num_streams} streams: {metric}",
            model=model,
            tp=0,
            dtype="none",
            batch_size=num_streams,
            context=0,
            metric=metric,
            unit=unit,
            value=value,
            runs=[value],
        )
        for metric, (unit, value) in figures.items()
    ]


def main(argv: list[str]) -> int:
    """Parses, measures, reports; returns the exit code."""
    options = _parser().parse_args(argv)
    cases: list[Case] = []
    for num_streams in options.streams:
        num_steps = round(options.seconds * 1000 / options.step_ms)
        measured = uvloop.run(
            measure(options.model, num_streams, num_steps, options.step_ms / 1000)
        )
        cases += _cases(measured, num_streams, options.model.name)
    record = Record(
        bench="frontend_streams",
        command=command_line("lockstep", "bench", "streams", *argv),
        server_command=command_line("python", "-m", "coordinator.frontend"),
        config=settings(options),
        cases=cases,
    )
    report(record, options.model.name, record_folder(options))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep bench streams", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder with a tokenizer.json")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--step-ms", type=float, default=2.0, help="time between two tokens")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time of each case")
    add_record_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
