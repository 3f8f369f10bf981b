"""A frontend's life: readiness and health, drain, a silent engine, a dead one."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from coordinator.frontend.frontend import Ending
from protos.lockstep.v1 import engine_pb2, generate_pb2
from tests.unit.coordinator.frontend.fake_engine import (
    Served,
    serving,
    within,
    write_ids_only_model,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
READINESS = ("", "readiness", "lockstep.v1.GenerateService", "vllm.grpc.engine.VllmEngine")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ids_only_model(tmp_path_factory.mktemp("ids"))


def request() -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(token_ids=generate_pb2.TokenIds(ids=[1, 2, 3]))


async def collect(call: Any) -> list[generate_pb2.GenerateResponse]:
    return [event async for event in call]


async def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await within(collect(call))
    return caught.value.code(), str(caught.value.details())


class HealthWatch:
    """Follows one health name."""

    def __init__(self, served: Served, name: str) -> None:
        stub = health_pb2_grpc.HealthStub(served.channel)
        self._call = stub.Watch(health_pb2.HealthCheckRequest(service=name))
        self._changes = aiter(self._call)

    async def next(self) -> int:
        change = await within(anext(self._changes))
        return int(change.status)

    async def until(self, status: int) -> None:
        while await self.next() != status:
            pass

    def cancel(self) -> None:
        self._call.cancel()


async def check(served: Served, name: str) -> int:
    stub = health_pb2_grpc.HealthStub(served.channel)
    answer = await within(stub.Check(health_pb2.HealthCheckRequest(service=name)))
    return int(answer.status)


def test_not_ready_until_the_engine_says_so_and_calls_name_the_cause(model: Path) -> None:
    async def main() -> None:
        async with serving(model, is_ready=False) as served:
            watch = HealthWatch(served, "readiness")
            assert await watch.next() == NOT_SERVING
            assert await check(served, "liveness") == SERVING
            code, details = await status_of(served.stub.Generate(request()))
            assert code == grpc.StatusCode.UNAVAILABLE
            assert "starting" in details
            served.engine.send_state(is_ready=False, cause="loading weights")
            served.engine.send_state(is_ready=True)
            assert await watch.next() == SERVING
            assert {await check(served, name) for name in READINESS} == {SERVING}
            served.engine.send_state(is_ready=False, cause="rank 1 lost at step 7")
            assert await watch.next() == NOT_SERVING
            assert [await check(served, name) for name in READINESS] == [NOT_SERVING] * len(
                READINESS
            )
            code, details = await status_of(served.stub.Generate(request()))
            assert code == grpc.StatusCode.UNAVAILABLE
            assert "rank 1 lost at step 7" in details
            assert served.engine.rejected == {"not_ready": 2}

    asyncio.run(main())


def test_each_rank_has_a_health_name(model: Path) -> None:
    async def main() -> None:
        async with serving(model) as served:
            watch = HealthWatch(served, "rank/1")
            assert await watch.next() == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            served.engine.send_state(ranks_up=[True, True])
            assert await watch.next() == SERVING
            served.engine.send_state(is_ready=False, ranks_up=[True, False])
            assert await watch.next() == NOT_SERVING
            assert await check(served, "rank/0") == SERVING

    asyncio.run(main())


def test_unknown_health_name_is_not_found(model: Path) -> None:
    async def main() -> None:
        async with serving(model) as served:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await check(served, "nonsense")
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND

    asyncio.run(main())


def test_a_watcher_that_leaves_does_not_silence_the_others(model: Path) -> None:
    async def main() -> None:
        async with serving(model) as served:
            leaving, staying = HealthWatch(served, ""), HealthWatch(served, "")
            assert (await leaving.next(), await staying.next()) == (SERVING, SERVING)
            leaving.cancel()
            served.engine.send_state(is_ready=False, cause="x")
            assert await staying.next() == NOT_SERVING

    asyncio.run(main())


def test_drain_goes_not_serving_finishes_streams_refuses_calls_and_ends(model: Path) -> None:
    async def main() -> None:
        async with serving(model) as served:
            call = served.stub.Generate(request())
            submit = await served.engine.next_submit()
            watch = HealthWatch(served, "")
            assert await watch.next() == SERVING
            served.engine.send(drain=engine_pb2.Drain(budget_seconds=60.0))
            assert await watch.next() == NOT_SERVING
            code, details = await status_of(served.stub.Generate(request()))
            assert code == grpc.StatusCode.UNAVAILABLE
            assert "stopping" in details
            served.engine.send_state(is_ready=True)  # the engine still can, we do not
            assert await check(served, "liveness") == SERVING
            assert await check(served, "") == NOT_SERVING
            assert not served.ending.done()
            served.engine.send_outputs({submit.handle: [5, 6]})
            served.engine.end(submit.handle)
            events = await within(collect(call))
            assert events[-1].HasField("finished")
            assert await within(served.ending) == Ending.DRAINED
            assert served.engine.rejected == {"draining": 1}

    asyncio.run(main())


def test_calls_are_taken_during_the_pause_before_a_drain_and_health_is_off(model: Path) -> None:
    async def main() -> None:
        async with serving(model) as served:
            watch = HealthWatch(served, "")
            assert await watch.next() == SERVING
            served.engine.send(drain=engine_pb2.Drain(budget_seconds=60.0, pause_seconds=2.0))
            assert await watch.next() == NOT_SERVING
            info = await within(served.stub.GetServerInfo(generate_pb2.GetServerInfoRequest()))
            assert (info.is_ready, info.is_draining) == (False, True)
            call = served.stub.Generate(request())
            submit = await served.engine.next_submit()
            served.engine.end(submit.handle)
            assert (await within(collect(call)))[-1].HasField("finished")
            # Nothing runs, and still it waits for those who come before the pause is over.
            assert not served.ending.done()
            assert await within(served.ending) == Ending.DRAINED

    asyncio.run(main())


def test_drain_ends_streams_that_outlast_its_budget(model: Path) -> None:
    async def main() -> None:
        async with serving(model) as served:
            call = served.stub.Generate(request())
            await served.engine.next_submit()
            served.engine.send(drain=engine_pb2.Drain(budget_seconds=0.2))
            code, details = await status_of(call)
            assert code == grpc.StatusCode.UNAVAILABLE
            assert "drain time of 0.2 s" in details
            assert await within(served.ending) == Ending.DRAINED

    asyncio.run(main())


def test_silent_engine_ends_streams_turns_health_off_and_is_reported(model: Path) -> None:
    async def main() -> None:
        async with serving(model, silence_timeout=0.7) as served:
            call = served.stub.Generate(request())
            await served.engine.next_submit()
            watch = HealthWatch(served, "")
            abort = served.stub.Abort(generate_pb2.AbortRequest(request_id="r"))
            code, details = await status_of(call)
            assert code == grpc.StatusCode.UNAVAILABLE
            assert "said nothing for 0.7 s" in details
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await within(abort)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            await watch.until(NOT_SERVING)
            assert await within(served.ending) == Ending.ENGINE_SILENT

    asyncio.run(main())


def test_engine_that_speaks_is_not_silent(model: Path) -> None:
    async def main() -> None:
        async with serving(model, silence_timeout=0.6) as served:
            loop = asyncio.get_running_loop()
            started = loop.time()
            while loop.time() - started < 2.0:
                served.engine.send_state()
                await asyncio.wait({served.ending}, timeout=0.1)
            assert not served.ending.done()

    asyncio.run(main())


def test_dead_engine_ends_streams_with_unavailable(model: Path) -> None:
    async def main() -> None:
        async with serving(model) as served:
            call = served.stub.Generate(request())
            submit = await served.engine.next_submit()
            served.engine.send_outputs({submit.handle: [9]})
            served.engine.close()
            events = aiter(call)
            assert (await within(anext(events))).HasField("started")
            assert list((await within(anext(events))).delta.token_ids) == [9]
            code, details = await status_of(events)
            assert code == grpc.StatusCode.UNAVAILABLE
            assert "coordinator has ended" in details
            assert await within(served.ending) == Ending.ENGINE_ENDED

    asyncio.run(main())


def test_reflection_lists_the_services(model: Path) -> None:
    async def main() -> None:
        async with serving(model) as served:
            stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
            call = stub.ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            answer = await within(call.read())
            names = {service.name for service in answer.list_services_response.service}
            assert names >= {
                "lockstep.v1.GenerateService",
                "vllm.grpc.engine.VllmEngine",
                "grpc.health.v1.Health",
            }
            await call.write(
                reflection_pb2.ServerReflectionRequest(
                    file_containing_symbol="lockstep.v1.GenerateService"
                )
            )
            found = await within(call.read())
            assert found.file_descriptor_response.file_descriptor_proto
            await call.done_writing()

    asyncio.run(main())
