"""A client that stops reading is cut, its request released, and nobody else notices."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.frontend.errors import SlowClient
from coordinator.frontend.slow_clients import MAX_UNREAD_TOKENS, SlowClientWatch
from coordinator.frontend.stream import CallStreams
from protos.lockstep.v1 import generate_pb2
from tests.unit.coordinator.frontend.fake_engine import (
    FakeEngine,
    Served,
    serving,
    within,
    write_ids_only_model,
)

# Far more than a client's HTTP/2 window and socket buffers hold.
_TOKENS_A_PUSH = 50_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ids_only_model(tmp_path_factory.mktemp("ids"))


def request() -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(token_ids=generate_pb2.TokenIds(ids=[1, 2, 3]))


async def collect(call: Any) -> list[generate_pb2.GenerateResponse]:
    async with asyncio.timeout(20.0):
        return [event async for event in call]


async def flood(engine: FakeEngine, handle: int) -> None:
    """Output without end."""
    while True:
        engine.send_outputs({handle: [5] * _TOKENS_A_PUSH})
        await engine.writer.drain()
        await asyncio.sleep(0.001)


def test_client_that_does_not_read_is_cut_and_its_request_released(model: Path) -> None:
    async def main() -> None:
        async with serving(model, slow_client_seconds=0.4) as served:
            call = served.stub.Generate(request())
            handle = (await served.engine.next_submit()).handle
            flooding = asyncio.create_task(flood(served.engine, handle))
            release = await served.engine.next_release()
            flooding.cancel()
            assert (release.handle, release.reason) == (handle, "slow_client")
            await _others_are_served(served)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(call)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            details = str(caught.value.details())
            for word in ("reads too slowly", "tokens unread", f"{MAX_UNREAD_TOKENS}", "0.4 s"):
                assert word in details
            assert not served.ending.done()

    asyncio.run(main())


def _at_once(wake: Callable[[], None]) -> None:
    wake()


async def _others_are_served(served: Served) -> None:
    other = served.stub.Generate(request())
    handle = (await served.engine.next_submit()).handle
    served.engine.send_outputs({handle: [1, 2]})
    served.engine.end(handle)
    assert (await collect(other))[-1].finished.usage.output_token_count == 2


def test_drain_does_not_wait_for_a_client_that_was_cut(model: Path) -> None:
    async def main() -> None:
        async with serving(model, slow_client_seconds=0.4) as served:
            call = served.stub.Generate(request())
            handle = (await served.engine.next_submit()).handle
            flooding = asyncio.create_task(flood(served.engine, handle))
            await served.engine.next_release()
            flooding.cancel()
            served.engine.send(drain={"budget_seconds": 60.0})
            await within(served.ending)
            call.cancel()

    asyncio.run(main())


def test_unread_output_within_the_limits_is_kept() -> None:
    async def main() -> None:
        watch = SlowClientWatch(limit_s=0.2)
        running = asyncio.create_task(watch.run())
        slow, few, reading = (CallStreams([index], _at_once) for index in range(3))
        slow.samples[0].push([0] * (MAX_UNREAD_TOKENS + 1), [])
        few.samples[0].push([0] * MAX_UNREAD_TOKENS, [])
        async with watch.watch(few), watch.watch(reading):
            with pytest.raises(SlowClient, match=f"{MAX_UNREAD_TOKENS + 1} tokens unread"):
                async with watch.watch(slow):
                    while True:
                        reading.samples[0].push([0] * (MAX_UNREAD_TOKENS + 1), [])
                        await asyncio.sleep(0.05)
                        await reading.take()
        running.cancel()

    asyncio.run(main())
