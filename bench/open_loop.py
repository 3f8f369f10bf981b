"""Requests that arrive whether or not the server keeps up, and what became of each."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

import grpc

from bench.requests import random_prompt
from protos.lockstep.v1 import generate_pb2, generate_pb2_grpc

_NUM_CHANNELS = 8
_PUSHBACK_KEY = "grpc-retry-pushback-ms"


@dataclass(frozen=True)
class Arrivals:
    """Poisson arrivals at `rate` requests a second for `seconds`; lengths in tokens."""

    rate: float
    seconds: float
    prompt_tokens: int
    output_tokens: int
    vocab_size: int
    deadline_s: float
    seed: int


@dataclass
class Outcomes:
    """What became of the requests of one run. Times in seconds."""

    first: list[float] = field(default_factory=list)  # arrival to first token, of those accepted
    longest_gaps: list[float] = field(default_factory=list)  # one each, of those finished
    # Of those finished, as the server says in the trailing metadata.
    in_queue: list[float] = field(default_factory=list)
    in_prefill: list[float] = field(default_factory=list)
    refused_after: list[float] = field(default_factory=list)  # arrival to the refusal
    num_finished: int = 0
    num_tokens: int = 0
    num_refused: int = 0
    num_refused_without_delay: int = 0
    others: dict[str, int] = field(default_factory=dict)  # ended in another status
    seconds: float = 0.0

    @property
    def goodput(self) -> float:
        """Tokens of finished requests a second."""
        return self.num_tokens / self.seconds


class OpenLoop:
    """Sends arrivals to one server; each request is sent once, refusals are not repeated."""

    def __init__(self, address: str) -> None:
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        self._channels = [
            grpc.aio.insecure_channel(address, options=options) for _ in range(_NUM_CHANNELS)
        ]
        self._stubs = [generate_pb2_grpc.GenerateServiceStub(c) for c in self._channels]

    async def close(self) -> None:
        """Closes the channels."""
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def run(self, arrivals: Arrivals, stop_at_refusal: bool = False) -> Outcomes:
        """Sends all, waits for all. `seconds` counts from the first arrival to the last end.

        With `stop_at_refusal` nothing more is sent once a request was refused.
        """
        generator = random.Random(arrivals.seed)
        outcomes = Outcomes()
        started = time.monotonic()
        calls: list[asyncio.Task[None]] = []
        due = started
        while (due := due + generator.expovariate(arrivals.rate)) < started + arrivals.seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if stop_at_refusal and outcomes.num_refused:
                break
            stub = self._stubs[len(calls) % _NUM_CHANNELS]
            prompt = random_prompt(generator, arrivals.prompt_tokens, arrivals.vocab_size)
            calls.append(asyncio.create_task(_call(stub, prompt, arrivals, due, outcomes)))
        await asyncio.gather(*calls)
        outcomes.seconds = time.monotonic() - started
        return outcomes


async def _call(
    stub: generate_pb2_grpc.GenerateServiceStub,
    prompt: list[int],
    arrivals: Arrivals,
    due: float,
    outcomes: Outcomes,
) -> None:
    """One request, which arrives at `due` however late this process comes to send it."""
    request = generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=prompt),
        sampling_params=generate_pb2.SamplingParams(
            temperature=0.0, max_tokens=arrivals.output_tokens, ignore_eos=True
        ),
    )
    last = due
    longest_gap = 0.0
    num_tokens = 0
    call = stub.Generate(request, timeout=arrivals.deadline_s)
    try:
        async for response in call:
            if not response.HasField("delta"):
                continue
            now = time.monotonic()
            if num_tokens:
                longest_gap = max(longest_gap, now - last)
            else:
                outcomes.first.append(now - due)
            last = now
            num_tokens += len(response.delta.token_ids)
    except grpc.aio.AioRpcError as error:
        _count_error(error, time.monotonic() - due, outcomes)
        return
    times = dict(await call.trailing_metadata())
    outcomes.in_queue.append(float(times["lockstep-queue-ms"]) / 1e3)
    outcomes.in_prefill.append(float(times["lockstep-prefill-ms"]) / 1e3)
    outcomes.num_finished += 1
    outcomes.num_tokens += num_tokens
    outcomes.longest_gaps.append(longest_gap)


def _count_error(error: grpc.aio.AioRpcError, seconds: float, outcomes: Outcomes) -> None:
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        outcomes.refused_after.append(seconds)
        outcomes.num_refused += 1
        metadata = dict(error.trailing_metadata() or ())
        outcomes.num_refused_without_delay += int(metadata.get(_PUSHBACK_KEY, "0")) <= 0
    else:
        name = error.code().name
        outcomes.others[name] = outcomes.others.get(name, 0) + 1
