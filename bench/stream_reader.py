"""`python -m bench.stream_reader ADDRESS STREAMS`: reads streams and tells when what arrived.

The client process of bench.frontend_streams. Prints a line "reading" when all streams are started,
and at the end prints, as JSON in one line, for each stream its arrivals: times (CLOCK_MONOTONIC,
seconds) and the ids received up to each.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import grpc
import uvloop

from protos.lockstep.v1 import generate_pb2

Arrivals = list[tuple[float, int]]
_LIMIT_S = 300.0


async def read_streams(address: str, num_streams: int) -> list[Arrivals]:
    """Runs `num_streams` calls at once to their ends."""
    async with grpc.aio.insecure_channel(
        address, options=[("grpc.enable_http_proxy", 0)]
    ) as channel:
        # Parsing waits until all is over: the client must not be what is measured.
        method = channel.unary_stream(
            "/lockstep.v1.GenerateService/Generate",
            request_serializer=generate_pb2.GenerateRequest.SerializeToString,
        )
        started = asyncio.Semaphore(0)
        tasks = [asyncio.create_task(_read(method, started)) for _ in range(num_streams)]
        for _ in tasks:
            await started.acquire()
        print("reading", flush=True)
        return [_arrivals(raw) for raw in await asyncio.gather(*tasks)]


async def _read(method: Any, started: asyncio.Semaphore) -> list[tuple[float, bytes]]:
    request = generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=[1, 2, 3]),
        sampling_params=generate_pb2.SamplingParams(ignore_eos=True),
    )
    received: list[tuple[float, bytes]] = []
    async for raw in method(request, timeout=_LIMIT_S):
        if not received:
            started.release()
        received.append((time.monotonic(), raw))
    return received


def _arrivals(received: list[tuple[float, bytes]]) -> Arrivals:
    arrivals = []
    num_ids = 0
    for arrived, raw in received:
        delta = generate_pb2.GenerateResponse.FromString(raw).delta
        if delta.token_ids:
            num_ids += len(delta.token_ids)
            arrivals.append((arrived, num_ids))
    return arrivals


def main(argv: list[str]) -> int:
    """Reads, prints, returns 0."""
    address, num_streams = argv
    arrivals = uvloop.run(read_streams(address, int(num_streams)))
    print(json.dumps(arrivals), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
