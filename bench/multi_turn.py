"""`lockstep bench multi-turn`: what the prefix cache saves where conversations go on.

Conversations share a system prompt; every turn sends the whole conversation so far and some new
tokens, greedy. The same conversations run with the prefix cache on and off: outputs must be
identical, and the figure is the share of prompt tokens that need not be computed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
import uvloop

from bench.cli import add_record_flags, record_folder, say
from bench.record import Case, Record, command_line, report, settings
from bench.requests import random_prompt
from bench.server_process import ServerProcess
from protos.lockstep.v1 import generate_pb2, generate_pb2_grpc

_CALL_LIMIT_S = 900.0
_START_LIMIT_S = 300.0


@dataclass(frozen=True)
class Workload:
    """How many conversations of how many turns, and lengths in tokens."""

    conversations: int
    turns: int
    system_tokens: int
    user_tokens: int
    output_tokens: int
    vocab_size: int
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """Outputs by conversation and turn, and what the server had to compute for them."""

    outputs: list[list[list[int]]]
    num_prompt_tokens: int
    num_cached_tokens: int
    seconds: float

    @property
    def saved_share(self) -> float:
        """Share of prompt tokens that were in the cache, 0 to 1."""
        return self.num_cached_tokens / self.num_prompt_tokens


async def run_workload(
    address: str, workload: Workload, *, use_prefix_cache: bool = True
) -> Outcome:
    """Runs all conversations at once, each turn after the one before."""
    generator = random.Random(workload.seed)
    system = random_prompt(generator, workload.system_tokens, workload.vocab_size)
    users = [
        [
            random_prompt(generator, workload.user_tokens, workload.vocab_size)
            for _ in range(workload.turns)
        ]
        for _ in range(workload.conversations)
    ]
    options = [("grpc.enable_http_proxy", 0)]
    started = time.monotonic()
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub = generate_pb2_grpc.GenerateServiceStub(channel)
        talks = await asyncio.gather(
            *(_talk(stub, workload, [*system], turns, use_prefix_cache) for turns in users)
        )
    return Outcome(
        outputs=[outputs for outputs, _ in talks],
        num_prompt_tokens=sum(usage.prompt_token_count for _, usages in talks for usage in usages),
        num_cached_tokens=sum(usage.cached_token_count for _, usages in talks for usage in usages),
        seconds=time.monotonic() - started,
    )


async def _talk(
    stub: generate_pb2_grpc.GenerateServiceStub,
    workload: Workload,
    conversation: list[int],
    turns: list[list[int]],
    use_prefix_cache: bool,
) -> tuple[list[list[int]], list[generate_pb2.Usage]]:
    """One conversation; `conversation` begins as the system prompt and grows."""
    outputs, usages = [], []
    for user in turns:
        conversation += user
        request = generate_pb2.GenerateRequest(
            token_ids=generate_pb2.TokenIds(ids=conversation),
            sampling_params=generate_pb2.SamplingParams(
                temperature=0.0, max_tokens=workload.output_tokens, ignore_eos=True
            ),
            use_prefix_cache=use_prefix_cache,
        )
        response = await stub.GenerateUnary(
            generate_pb2.GenerateUnaryRequest(request=request), timeout=_CALL_LIMIT_S
        )
        outputs.append(list(response.output.token_ids))
        usages.append(response.finished.usage)
        conversation += outputs[-1]
    return outputs, usages


def main(argv: list[str]) -> int:
    """Parses, measures, reports; returns 1 if the outputs differ."""
    options = _parser().parse_args(argv)
    workload = Workload(
        options.conversations,
        options.turns,
        options.system_tokens,
        options.user_tokens,
        options.output_tokens,
        options.vocab_size,
        options.seed,
    )
    flags = ["--model", str(options.model), "--tp", str(options.tp), "--dtype", options.dtype]
    outcomes = {}
    for setting in ("off", "on"):
        with ServerProcess([*flags, "--prefix-cache", setting], _START_LIMIT_S) as server:
            outcomes[setting] = uvloop.run(run_workload(server.address, workload))
        say(f"prefix cache {setting}: {_summary(outcomes[setting])}")
    is_same = outcomes["on"].outputs == outcomes["off"].outputs
    say(f"outputs are {'identical' if is_same else 'DIFFERENT'}")
    record = Record(
        bench="multi-turn",
        command=command_line("lockstep", "bench", "multi-turn", *argv),
        server_command=command_line("lockstep", "serve", *flags, "--prefix-cache", "on|off"),
        config=settings(options, identical_outputs=is_same),
        cases=_cases(options, outcomes),
    )
    report(record, options.model.name, record_folder(options))
    return 0 if is_same else 1


def _summary(outcome: Outcome) -> str:
    return (
        f"{outcome.num_prompt_tokens} prompt tokens, {outcome.num_cached_tokens} of them cached"
        f" ({100 * outcome.saved_share:.1f}%), {outcome.seconds:.1f} s"
    )


def _cases(options: argparse.Namespace, outcomes: dict[str, Outcome]) -> list[Case]:
    figures = [
        ("prompt-tokens-saved", "share", "%", 100 * outcomes["on"].saved_share),
        ("seconds-on", "duration", "s", outcomes["on"].seconds),
        ("seconds-off", "duration", "s", outcomes["off"].seconds),
    ]
    return [
        Case(
            case=f"multi-turn-{options.conversations}x{options.turns}-{name}",
            model=options.model.name,
            tp=options.tp,
            dtype=options.dtype,
            batch_size=options.conversations,
            context=options.system_tokens
            + options.turns * (options.user_tokens + options.output_tokens),
            metric=metric,
            unit=unit,
            value=value,
            runs=[value],
        )
        for name, metric, unit, value in figures
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep bench multi-turn", allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=49152, help="of the random ids")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--conversations", type=int, default=32)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--system-tokens", type=int, default=1000)
    parser.add_argument("--user-tokens", type=int, default=40)
    parser.add_argument("--output-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    add_record_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
