"""Calls of `VllmEngine` against a frontend with a scripted engine."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.lockstep.v1 import generate_pb2
from protos.vllm_engine import vllm_engine_pb2 as vllm
from protos.vllm_engine.vllm_engine_pb2_grpc import VllmEngineStub
from tests.unit.coordinator.frontend.fake_engine import (
    Served,
    serving,
    within,
)

Script = Callable[[Served, VllmEngineStub], Awaitable[None]]

LENGTH = generate_pb2.FINISH_REASON_LENGTH
STOP = generate_pb2.FINISH_REASON_STOP
ABORTED = generate_pb2.FINISH_REASON_ABORTED


def run(model: Path, script: Script, **settings: Any) -> None:
    """Runs `script` against a serving frontend."""

    async def main() -> None:
        async with serving(model, **settings) as served:
            await script(served, VllmEngineStub(served.channel))

    asyncio.run(main())


def request(stream: bool = True, name: str = "", **params: Any) -> vllm.GenerateRequest:
    return vllm.GenerateRequest(
        request_id=name,
        tokenized=vllm.TokenizedInput(input_ids=[1, 2, 3]),
        sampling_params=vllm.SamplingParams(**params),
        stream=stream,
    )


async def collect(call: Any) -> list[vllm.GenerateResponse]:
    async def all_of() -> list[vllm.GenerateResponse]:
        return [message async for message in call]

    return await within(all_of())


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await within(call if isinstance(call, grpc.aio.UnaryUnaryCall) else collect(call))
    return caught.value


def logprobs_of(*values: float) -> list[generate_pb2.TokenLogprobs]:
    return [
        generate_pb2.TokenLogprobs(logprob=value, top_token_ids=[8], top_logprobs=[-0.5])
        for value in values
    ]
