"""Calls of a frontend with a scripted engine behind it, and what is asked of their events."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos.lockstep.v1 import generate_pb2
from tests.unit.coordinator.frontend.fake_engine import Served, serving, within

Script = Callable[[Served], Awaitable[None]]


def run(model: Path, script: Script, **settings: Any) -> None:
    """Runs `script` against a serving frontend."""

    async def main() -> None:
        async with serving(model, **settings) as served:
            await script(served)

    asyncio.run(main())


def text_request(text: str = "hello", **params: Any) -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(
        text=text, sampling_params=generate_pb2.SamplingParams(**params)
    )


async def collect(call: Any) -> list[generate_pb2.GenerateResponse]:
    return await within(all_events(call))


async def all_events(call: Any) -> list[generate_pb2.GenerateResponse]:
    return [event async for event in call]


async def failure(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await within(call)
    return caught.value


def ids_of(packed: bytes) -> list[int]:
    ids: list[int] = np.frombuffer(packed, "<i4").tolist()
    return ids


def kinds(events: list[generate_pb2.GenerateResponse]) -> list[str]:
    return [str(event.WhichOneof("event")) for event in events]
