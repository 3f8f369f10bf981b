"""The serving cases in which requests meet others, or long contexts.

context  `bs` requests that stand at 8,192 tokens, their prompts cached: as decode, in less tokens.
arrival  first token of a request of 128 ids while 64 others decode, beside that of a lone one.
serving  Poisson arrivals, 100-1024 tokens in and out: goodput, p99 of first tokens and of gaps.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Iterator

from bench.cases import PROMPT_TOKENS, Subject, first_tokens
from bench.histogram import p99
from bench.record import Case
from bench.requests import Request, Timing, random_prompt

_CONTEXT = 8192
_SHORT, _LONG = 20, 120
_NUM_STREAMS = 64
_STREAM_TOKENS = 2000
_NUM_ARRIVALS = 20
_LONGEST_PAUSE_S = 0.02
_SHORTEST, _LONGEST = 100, 1024


async def context(subject: Subject, batch_size: int, quick: bool) -> Case:
    """Milliseconds per token behind a long context.

    The same prompts every time: the prefix cache holds them, so that their prefill, whose time
    would hide that of the tokens, is done once.
    """
    prompts = [request.prompt_ids for request in subject.prompts(batch_size, _CONTEXT, 1)]

    async def seconds(num_tokens: int) -> float:
        requests = [Request(prompt, num_tokens) for prompt in prompts]
        return max(timing.last for timing in await subject.client.run(requests))

    await seconds(1)
    repeats = range(1 if quick else 3)
    short = statistics.median([await seconds(_SHORT) for _ in repeats])
    runs = [(await seconds(_LONG) - short) / (_LONG - _SHORT) * 1e3 for _ in repeats]
    return subject.case(
        f"context{_CONTEXT}-bs{batch_size}",
        batch_size=batch_size,
        context=_CONTEXT + _LONG,
        metric="time_per_token",
        unit="ms",
        value=statistics.median(runs),
        runs=runs,
    )


async def arrival(
    subject: Subject, num_arrivals: int = _NUM_ARRIVALS, stream_tokens: int = _STREAM_TOKENS
) -> list[Case]:
    """Milliseconds to the first token of one request, alone and amid decoding streams.

    Each comes a random pause after the last, so at any moment of a step. The streams need enough
    tokens to last as long.
    """
    alone = await first_tokens(subject, PROMPT_TOKENS, num_arrivals, _LONGEST_PAUSE_S)
    streams = subject.prompts(_NUM_STREAMS, PROMPT_TOKENS, stream_tokens)
    background = asyncio.create_task(subject.client.run(streams))
    try:
        await asyncio.sleep(2.0)  # all are past their prompts
        amid = await first_tokens(subject, PROMPT_TOKENS, num_arrivals, _LONGEST_PAUSE_S)
        if background.done():
            background.result()  # refused, perhaps: that says more
            raise RuntimeError(f"the streams ended before {num_arrivals} requests were answered")
    finally:
        background.cancel()
        await asyncio.wait([background])
    return [
        subject.case(
            f"arrival-{name}",
            batch_size=batch_size,
            context=PROMPT_TOKENS,
            metric="time_to_first_token",
            unit="ms",
            value=statistics.median(runs),
            runs=runs,
        )
        for name, batch_size, runs in (("alone", 1, alone), ("amid64", _NUM_STREAMS + 1, amid))
    ]


async def serving(subject: Subject, rate: float, seconds: float) -> list[Case]:
    """`rate` requests a second arrive for so long, whether or not the server keeps up."""
    generator = random.Random(0)
    loop = asyncio.get_running_loop()
    started = loop.time()
    calls: list[asyncio.Task[list[Timing]]] = []
    for delay, request in _arrivals(generator, rate, seconds, subject.vocab_size):
        await asyncio.sleep(max(0.0, started + delay - loop.time()))
        calls.append(asyncio.create_task(subject.client.run([request])))
    timings = [timing for call in calls for timing in await call]
    took = loop.time() - started
    gaps = [gap * 1e3 for timing in timings for gap in timing.gaps]
    figures = {
        "goodput": ("tok/s", sum(timing.num_tokens for timing in timings) / took),
        "ttft-p99": ("ms", p99([timing.first * 1e3 for timing in timings])),
        "gap-p99": ("ms", p99(gaps)),
    }
    return [
        subject.case(
            f"serving-{rate:g}rps-{name}",
            batch_size=len(timings),
            context=2 * _LONGEST,
            metric=name,
            unit=unit,
            value=value,
            runs=[value],
        )
        for name, (unit, value) in figures.items()
    ]


def _arrivals(
    generator: random.Random, rate: float, seconds: float, vocab_size: int
) -> Iterator[tuple[float, Request]]:
    """When each comes, in seconds, and what it asks for."""
    due = generator.expovariate(rate)
    while due < seconds:
        length, max_tokens = (generator.randint(_SHORTEST, _LONGEST) for _ in "io")
        prompt = random_prompt(generator, length, vocab_size)
        yield due, Request(prompt, max_tokens, temperature=0.6)
        due += generator.expovariate(rate)
