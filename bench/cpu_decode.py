"""`lockstep bench cpu`: decoding on CPU through gRPC against transformers' generate, interleaved.

Both use the same checkpoint, dtype, prompt and number of threads, with the KV cache on; the median
of the per-pair ratios counts. Then TP=2 with one thread a rank against TP=1 with one thread.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
import uvloop

from bench.cli import add_record_flags, record_folder, say
from bench.record import (
    Case,
    Record,
    command_line,
    report,
    settings,
)
from bench.requests import Client, Request, random_prompt
from bench.server_process import ServerProcess

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_START_LIMIT_S = 120.0


def main(argv: list[str]) -> int:
    """Parses, measures, reports; returns the exit code."""
    options = _parser().parse_args(argv)
    generator = random.Random(0)
    pairs = _against_transformers(options, generator)
    one, two = _one_thread_a_rank(options, generator)
    ratios = [theirs / ours for ours, theirs in pairs]
    faster = [first / second for first, second in zip(one, two, strict=True)]
    new = options.new_tokens
    measured = [
        _case(options, "cpu-decode-tp1", 1, "tok/s", [new / ours for ours, _ in pairs]),
        _case(options, "cpu-transformers", 1, "tok/s", [new / theirs for _, theirs in pairs]),
        _case(options, "cpu-speed-up-over-transformers", 1, "ratio", ratios),
        _case(options, "cpu-decode-tp1-1thread", 1, "tok/s", [new / seconds for seconds in one]),
        _case(options, "cpu-decode-tp2-1thread", 2, "tok/s", [new / seconds for seconds in two]),
        _case(options, "cpu-speed-up-tp2-over-tp1", 2, "ratio", faster),
    ]
    record = Record(
        bench="cpu",
        command=command_line("lockstep", "bench", "cpu", *argv),
        server_command=command_line("lockstep", "serve", *_flags(options, 1, options.threads)),
        config=settings(options),
        cases=measured,
    )
    report(record, options.model.name, record_folder(options))
    return 0


def _against_transformers(
    options: argparse.Namespace, generator: random.Random
) -> list[tuple[float, float]]:
    """(our seconds, their seconds) of each interleaved pair."""
    torch.set_num_threads(options.threads)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, dtype=_DTYPES[options.dtype]
    ).eval()
    with ServerProcess(_flags(options, 1, options.threads), _START_LIMIT_S) as server:
        pairs = []
        for repeat in range(options.pairs + 1):
            prompt = random_prompt(generator, options.prompt_tokens, oracle.config.vocab_size)
            pair = (_ours(server.address, prompt, options), _theirs(oracle, prompt, options))
            if repeat:  # the first one warms up
                pairs.append(pair)
                say(f"pair {repeat}: ours {pair[0]:.2f} s, transformers {pair[1]:.2f} s")
    return pairs


def _one_thread_a_rank(
    options: argparse.Namespace, generator: random.Random
) -> tuple[list[float], list[float]]:
    """Seconds of each run at TP=1 and at TP=2, one thread a rank."""
    seconds: dict[int, list[float]] = {}
    for tp in (1, 2):
        with ServerProcess(_flags(options, tp, 1), _START_LIMIT_S) as server:
            runs = [
                _ours(
                    server.address, random_prompt(generator, options.prompt_tokens, 1000), options
                )
                for _ in range(options.pairs + 1)
            ]
        seconds[tp] = runs[1:]
        say(f"TP={tp}, one thread a rank: {statistics.median(seconds[tp]):.2f} s")
    return seconds[1], seconds[2]


def _ours(address: str, prompt: list[int], options: argparse.Namespace) -> float:
    async def run() -> float:
        client = Client(address)
        try:
            (timing,) = await client.run([Request(prompt, options.new_tokens)])
        finally:
            await client.close()
        return timing.last

    return uvloop.run(run())


def _theirs(
    oracle: transformers.PreTrainedModel, prompt: list[int], options: argparse.Namespace
) -> float:
    ids = torch.tensor([prompt])
    started = time.perf_counter()
    with torch.inference_mode():
        output = oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.new_tokens,
            min_new_tokens=options.new_tokens,
            do_sample=False,
        )
    assert output.shape[1] == len(prompt) + options.new_tokens
    return time.perf_counter() - started


def _flags(options: argparse.Namespace, tp: int, threads: int) -> list[str]:
    return [
        *("--model", str(options.model), "--tp", str(tp), "--dtype", options.dtype),
        *("--devices", "cpu", "--num-threads", str(threads)),
    ]


def _case(options: argparse.Namespace, name: str, tp: int, unit: str, runs: list[float]) -> Case:
    return Case(
        case=name,
        model=options.model.name,
        tp=tp,
        dtype=options.dtype,
        batch_size=1,
        context=options.prompt_tokens + options.new_tokens,
        metric="decode",
        unit=unit,
        value=statistics.median(runs),
        runs=runs,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep bench cpu", allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=5)
    add_record_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
