"""The serving cases, defined as the peer was measured.

decode   `bs` requests of 128 random ids together, greedy: (time of 220 new tokens - of 20) / 200;
         of a lone request also the p99 of the gaps between its messages.
ttft     one request of L random ids, one new token, median of 5.
offline  256 requests of 100-1024 tokens in and out, temperature 0.6: output tokens per second.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.histogram import p99
from bench.peer import PEER_NAME, peer_figure
from bench.record import Case
from bench.requests import Client, Request, offline256, random_prompt

PROMPT_TOKENS = 128
_SHORT, _LONG = 20, 220


@dataclass(frozen=True)
class Subject:
    """What is measured, and the weight-read floor of one decode step in ms (None: no GPU).

    `has_peer`: the peer was measured on such hardware, so that its figures may stand beside ours.
    """

    client: Client
    model: str
    tp: int
    dtype: str
    vocab_size: int
    floor_ms: float | None
    has_peer: bool
    generator: random.Random
    say: Callable[[str], None]

    def prompts(self, count: int, length: int, max_tokens: int) -> list[Request]:
        """Fresh random requests."""
        return [
            Request(random_prompt(self.generator, length, self.vocab_size), max_tokens)
            for _ in range(count)
        ]

    def case(self, name: str, **fields: Any) -> Case:
        """A case of this subject with the peer's figure, if it has one."""
        value = peer_figure(self.model, self.tp, name) if self.has_peer else None
        peer = {"name": PEER_NAME, "value": value} if value is not None else None
        case = Case(case=name, model=self.model, tp=self.tp, dtype=self.dtype, peer=peer, **fields)
        self.say(f"{name}: {case.value:.4g} {case.unit} (peer {value or '-'})")
        return case


async def decode(subject: Subject, batch_size: int, quick: bool) -> list[Case]:
    """Milliseconds per token at a batch size; `quick` runs each length once."""
    gaps: list[float] = []

    async def seconds(num_tokens: int) -> float:
        requests = subject.prompts(batch_size, PROMPT_TOKENS, num_tokens)
        timings = await subject.client.run(requests)
        gaps.extend(gap * 1e3 for timing in timings for gap in timing.gaps)
        return max(timing.last for timing in timings)

    await seconds(_SHORT)
    short = statistics.median([await seconds(_SHORT) for _ in range(1 if quick else 3)])
    longs = [await seconds(_LONG) for _ in range(1 if quick else 2)]
    runs = [(long - short) / (_LONG - _SHORT) * 1e3 for long in longs]
    common = {"batch_size": batch_size, "context": PROMPT_TOKENS + _LONG, "unit": "ms"}
    value = statistics.median(runs)
    name = f"decode-bs{batch_size}"
    cases = [
        subject.case(
            name, metric="time_per_token", value=value, runs=runs, floor=subject.floor_ms, **common
        )
    ]
    if batch_size == 1:
        gap = p99(gaps)
        cases.append(
            subject.case(f"{name}-gap-p99", metric="message_gap", value=gap, runs=[gap], **common)
        )
    return cases


async def ttft(subject: Subject, length: int, quick: bool) -> Case:
    """Milliseconds to the first token of one request of `length` ids."""
    runs = await first_tokens(subject, length, 1 if quick else 5)
    return subject.case(
        f"ttft-{length}",
        batch_size=1,
        context=length,
        metric="time_to_first_token",
        unit="ms",
        value=statistics.median(runs),
        runs=runs,
    )


async def first_tokens(
    subject: Subject, length: int, num_runs: int, longest_pause_s: float = 0.0
) -> list[float]:
    """Milliseconds to the first token of each of so many requests in turn, behind a warm-up.

    Before each is a random pause of up to `longest_pause_s` seconds.
    """
    runs = []
    for _ in range(1 + num_runs):
        if longest_pause_s:
            await asyncio.sleep(subject.generator.uniform(0.0, longest_pause_s))
        (timing,) = await subject.client.run(subject.prompts(1, length, 1))
        runs.append(timing.first * 1e3)
    return runs[1:]


async def offline(subject: Subject) -> Case:
    """Output tokens per second over the whole offline batch."""
    requests = offline256()
    timings = await subject.client.run(requests)
    num_tokens = sum(timing.num_tokens for timing in timings)
    rate = num_tokens / max(timing.last for timing in timings)
    return subject.case(
        "offline256",
        batch_size=len(requests),
        context=2048,
        metric="output_throughput",
        unit="tok/s",
        value=rate,
        runs=[rate],
    )
