"""Requests as a benchmark sends them: token ids in, token ids out, every arrival timed."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

import grpc

from protos.lockstep.v1 import generate_pb2, generate_pb2_grpc

_CALL_LIMIT_S = 900.0
_NUM_CHANNELS = 8


@dataclass(frozen=True)
class Request:
    """A prompt and how much to generate; the end-of-sequence ids are ignored."""

    prompt_ids: list[int]
    max_tokens: int
    temperature: float = 0.0


@dataclass(frozen=True)
class Timing:
    """When tokens came, seconds since the batch was submitted."""

    first: float
    last: float
    num_tokens: int
    gaps: list[float]  # between messages with tokens


class Client:
    """Sends batches of requests through the public API."""

    def __init__(self, address: str) -> None:
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        self._channels = [
            grpc.aio.insecure_channel(address, options=options) for _ in range(_NUM_CHANNELS)
        ]
        self._stubs = [generate_pb2_grpc.GenerateServiceStub(c) for c in self._channels]

    async def close(self) -> None:
        """Closes the channels."""
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def run(self, requests: list[Request]) -> list[Timing]:
        """Submits all requests together and waits for all; raises what any of them raises."""
        started = time.perf_counter()
        return await asyncio.gather(
            *(
                self._run_one(self._stubs[index % _NUM_CHANNELS], request, started)
                for index, request in enumerate(requests)
            )
        )

    async def _run_one(
        self, stub: generate_pb2_grpc.GenerateServiceStub, request: Request, started: float
    ) -> Timing:
        call = stub.Generate(request_message(request), timeout=_CALL_LIMIT_S)
        first = last = 0.0
        gaps = []
        num_tokens = 0
        async for response in call:
            if response.WhichOneof("event") != "delta":
                continue
            now = time.perf_counter() - started
            num_tokens += len(response.delta.token_ids)
            if first:
                gaps.append(now - last)
            first, last = first or now, now
        if num_tokens != request.max_tokens:
            raise RuntimeError(f"asked for {request.max_tokens} tokens, got {num_tokens}")
        return Timing(first, last, num_tokens, gaps)


def request_message(request: Request) -> generate_pb2.GenerateRequest:
    """As it is sent."""
    return generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=request.prompt_ids),
        sampling_params=generate_pb2.SamplingParams(
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            ignore_eos=True,
            seed=0,
        ),
    )


def random_prompt(generator: random.Random, length: int, vocab_size: int) -> list[int]:
    """Fresh random ids, so that no cache can help."""
    return [generator.randrange(vocab_size) for _ in range(length)]


def offline256() -> list[Request]:
    """256 requests, 133,966 output tokens: prompts and outputs of 100-1024 tokens, seed 0.

    Drawn in the peer's order: all prompts first, then all output lengths.
    """
    generator = random.Random(0)
    prompts = [
        [generator.randint(0, 10000) for _ in range(generator.randint(100, 1024))]
        for _ in range(256)
    ]
    return [Request(prompt, generator.randint(100, 1024), temperature=0.6) for prompt in prompts]
