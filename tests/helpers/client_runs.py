"""One way to run a call with the sync and the async client, so that each test asks both."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lockstep.client import (
    AsyncClient,
    CallFailed,
    Client,
    ClientConfig,
    Completion,
    Delta,
    GenerateRequest,
)

KINDS = ("sync", "async")


@dataclass
class Run:
    """What a streaming call gave."""

    generation: Any
    deltas: list[Delta] = field(default_factory=list)
    error: CallFailed | None = None

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> Sequence[int]:
        return tuple(token for delta in self.deltas for token in delta.token_ids)


def stream(
    kind: str, address: str, request: GenerateRequest, config: ClientConfig, **options: Any
) -> Run:
    """Reads a stream to its end or error."""
    if kind == "sync":
        return _stream(address, request, config, options)
    return asyncio.run(_stream_async(address, request, config, options))


def unary(kind: str, address: str, request: GenerateRequest, config: ClientConfig) -> Completion:
    """Raises CallFailed."""
    if kind == "sync":
        with Client(address, config) as client:
            return client.generate_unary(request)

    async def ask() -> Completion:
        async with AsyncClient(address, config) as client:
            return await client.generate_unary(request)

    return asyncio.run(ask())


def _stream(
    address: str, request: GenerateRequest, config: ClientConfig, options: dict[str, Any]
) -> Run:
    with Client(address, config) as client:
        run = Run(client.generate(request, **options))
        try:
            for delta in run.generation:
                run.deltas.append(delta)
        except CallFailed as error:
            run.error = error
        return run


async def _stream_async(
    address: str, request: GenerateRequest, config: ClientConfig, options: dict[str, Any]
) -> Run:
    async with AsyncClient(address, config) as client:
        run = Run(client.generate(request, **options))
        try:
            async for delta in run.generation:
                run.deltas.append(delta)
        except CallFailed as error:
            run.error = error
        return run
