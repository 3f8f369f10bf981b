"""A gateway's channels, which ping all the time, through a silence of the engine.

Gateways ping every 10 to 30 seconds; here every 50 ms, so that as many pings come in 2 seconds as
else in a quarter of an hour.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.vllm_engine import vllm_engine_pb2 as vllm
from protos.vllm_engine.vllm_engine_pb2_grpc import VllmEngineStub
from tests.unit.coordinator.frontend.fake_engine import serving, within, write_ids_only_model

_NUM_CHANNELS = 8
_PING_MS = 50
_SILENCE_S = 2.0
_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", _PING_MS),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Without it channels with the same options share one connection.
    ("grpc.use_local_subchannel_pool", 1),
]


@contextlib.asynccontextmanager
async def pinging_stubs(port: int) -> AsyncIterator[list[VllmEngineStub]]:
    """Stubs over channels of their own, each with its connection."""
    async with contextlib.AsyncExitStack() as stack:
        channels = [
            grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=_OPTIONS)
            for _ in range(_NUM_CHANNELS)
        ]
        for channel in channels:
            await stack.enter_async_context(channel)
        yield [VllmEngineStub(channel) for channel in channels]


async def last_of(call: Any) -> Any:
    async for message in call:
        last = message
    return last


def test_eight_channels_that_ping_are_not_cut_in_a_silence(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            serving(write_ids_only_model(tmp_path)) as served,
            pinging_stubs(served.engine.port) as stubs,
        ):
            request = vllm.GenerateRequest(tokenized=vllm.TokenizedInput(input_ids=[1]))
            calls = [stub.Generate(request) for stub in stubs]
            ends = [asyncio.ensure_future(last_of(call)) for call in calls]
            submits = [await served.engine.next_submit() for _ in calls]
            await asyncio.wait(ends, timeout=_SILENCE_S)
            assert not any(end.done() for end in ends)
            for submit in submits:
                served.engine.send_outputs({submit.handle: [5]})
                served.engine.end(submit.handle)
            answers = await within(asyncio.gather(*ends))
            assert [list(answer.complete.output_ids) for answer in answers] == [[5]] * 8
            # And between calls.
            await asyncio.sleep(_SILENCE_S)
            for stub in stubs:
                await within(stub.HealthCheck(vllm.HealthCheckRequest()))

    asyncio.run(main())


def test_a_stock_server_cuts_them() -> None:
    """Guards the test above."""

    async def silent(request: bytes, context: Any) -> bytes:
        await asyncio.sleep(60)
        return b""

    async def main() -> None:
        server = grpc.aio.server()
        method = grpc.unary_stream_rpc_method_handler(silent)
        name = "vllm.grpc.engine.VllmEngine"
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(name, {"Generate": method}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with pinging_stubs(port) as stubs:
            call = stubs[0].Generate(vllm.GenerateRequest())
            with pytest.raises(grpc.aio.AioRpcError, match="too_many_pings|Too many pings"):
                await within(last_of(call))
        await server.stop(None)

    asyncio.run(main())
