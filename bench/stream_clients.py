"""A process of clients that stream all the time: `python -m bench.stream_clients ADDRESS ...`.

Each client sends a request, reads it to its end, and sends the next. What is measured begins after
the warm-up: gaps between a client's messages, time to first token and, where the workers' tokens
tell the time (`--clock-modulus`), how old a token is when its client has it. One JSON line last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field

import grpc
import uvloop

from bench.histogram import LogHistogram
from bench.requests import random_prompt
from protos.lockstep.v1 import generate_pb2, generate_pb2_grpc

_WINDOW_S = 10.0
_RETRYABLE = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
_MIN_BACK_OFF_S = 0.05


@dataclass
class Measured:
    """What the clients of this process saw after the warm-up."""

    num_tokens: int = 0
    num_messages: int = 0
    num_finished: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    gaps: LogHistogram = field(default_factory=LogHistogram)
    first: LogHistogram = field(default_factory=LogHistogram)
    lags: list[LogHistogram] = field(default_factory=list)

    def as_json(self) -> str:
        """One line; histograms as their counts."""
        values = {**vars(self), "gaps": self.gaps.counts, "first": self.first.counts}
        return json.dumps({**values, "lags": [window.counts for window in self.lags]})


class StreamClients:
    """All clients of one process, on one event loop."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._generator = random.Random(options.seed)
        channel_options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        self._channels = [
            grpc.aio.insecure_channel(options.address, options=channel_options)
            for _ in range(options.channels)
        ]
        self._stubs = [generate_pb2_grpc.GenerateServiceStub(c) for c in self._channels]
        self._begins = time.monotonic() + options.warm_up
        self._ends = self._begins + options.seconds
        self.measured = Measured()

    async def run(self) -> None:
        """Streams until the time is over; raises what a call ends with if it is no refusal."""
        clients = [asyncio.create_task(self._stream(n)) for n in range(self._options.streams)]
        over = asyncio.create_task(asyncio.sleep(self._options.warm_up + self._options.seconds))
        try:
            await asyncio.wait([*clients, over], return_when=asyncio.FIRST_COMPLETED)
            for client in clients:
                if client.done():
                    client.result()
        finally:
            for task in (*clients, over):
                task.cancel()
            await asyncio.wait([*clients, over])
            await asyncio.gather(*(channel.close() for channel in self._channels))

    async def _stream(self, number: int) -> None:
        stub = self._stubs[number % len(self._stubs)]
        # Out of phase from the first request on, as clients are.
        length = self._generator.randrange(1, self._options.max_tokens + 1)
        while True:
            try:
                await self._one_call(stub, length)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _RETRYABLE:
                    raise
                await self._refused(error)
            length = self._options.max_tokens

    async def _refused(self, error: grpc.aio.AioRpcError) -> None:
        name = error.code().name
        self.measured.refused[name] = self.measured.refused.get(name, 0) + 1
        metadata = dict(error.trailing_metadata() or ())
        pause_s = int(metadata.get("grpc-retry-pushback-ms", 0)) / 1e3
        await asyncio.sleep(max(pause_s, _MIN_BACK_OFF_S))

    async def _one_call(self, stub: generate_pb2_grpc.GenerateServiceStub, length: int) -> None:
        options, measured = self._options, self.measured
        prompt = random_prompt(self._generator, options.prompt_tokens, options.vocab_size)
        request = generate_pb2.GenerateRequest(
            token_ids=generate_pb2.TokenIds(ids=prompt),
            sampling_params=generate_pb2.SamplingParams(
                temperature=0.0, max_tokens=length, ignore_eos=not options.may_stop
            ),
        )
        last = time.monotonic()
        is_first = True
        async for response in stub.Generate(request, timeout=options.call_limit):
            kind = response.WhichOneof("event")
            now = time.monotonic()
            if now < self._begins or kind == "started":
                continue
            if kind == "finished":
                measured.num_finished += 1
                continue
            token_ids = response.delta.token_ids
            (measured.first if is_first else measured.gaps).add(now - last)
            measured.num_messages += 1
            measured.num_tokens += len(token_ids)
            if options.clock_modulus:
                self._count_lags(now, token_ids)
            last, is_first = now, False

    def _count_lags(self, now: float, token_ids: list[int]) -> None:
        """Token ids are milliseconds of CLOCK_MONOTONIC modulo `clock_modulus`."""
        window = int((now - self._begins) / _WINDOW_S)
        lags = self.measured.lags
        while len(lags) <= window:
            lags.append(LogHistogram())
        modulus = self._options.clock_modulus
        now_ms = now * 1e3
        for token_id in token_ids:
            lags[window].add(((now_ms - token_id) % modulus) / 1e3)


def main(argv: list[str]) -> int:
    """Runs the clients; prints what they measured."""
    options = _parser().parse_args(argv)

    async def run() -> Measured:
        clients = StreamClients(options)
        await clients.run()
        return clients.measured

    print(uvloop.run(run()).as_json(), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.stream_clients", allow_abbrev=False)
    parser.add_argument("address", help="host:port of the public API")
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--warm-up", type=float, default=5.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, required=True, help="of the random prompts")
    parser.add_argument("--clock-modulus", type=int, default=0, help="0: tokens tell no time")
    parser.add_argument("--may-stop", action="store_true", help="stop ids end a request")
    parser.add_argument("--call-limit", type=float, default=600.0, help="deadline of a call")
    parser.add_argument("--seed", type=int, default=None)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
