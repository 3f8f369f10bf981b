"""The public port among hostile clients: whatever they send, others are served and nothing is left.

A fuzzer at every call, then connections that do nothing, that crawl, and that open and cancel calls
as fast as they can. A bystander asks for the same tokens all the while and must get them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from protos.lockstep.v1 import generate_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.helpers.api_fuzz import Rpc, hostile_message, public_rpcs
from tests.helpers.message_client import Client, ids_request
from tests.helpers.raw_http2 import PREFACE, RawConnection, call_headers
from tests.helpers.served_group import ServedGroup, value_of
from tests.integration.chaos_support import wait_until

pytestmark = pytest.mark.timeout(240)  # includes the start of the group, perhaps on busy cores
_LIMIT_S = 60.0
_NUM_FUZZERS = 16
_SHORT_S, _LONG_S = 8.0, 180.0
_GENERATE = "/lockstep.v1.GenerateService/Generate"
_CODE = grpc.StatusCode
_EXPECTED = {
    *(_CODE.OK, _CODE.INVALID_ARGUMENT, _CODE.RESOURCE_EXHAUSTED, _CODE.CANCELLED),
    _CODE.DEADLINE_EXCEEDED,
}
_EXPECTED_OF_HEALTH = {*_EXPECTED, _CODE.NOT_FOUND}
# What a process may grow by: allocators keep pages, caches fill.
_MAX_GROWTH_BYTES = 48 << 20
# What calls cost that are reset before Python has seen them, 10 KB each while they are pending.
_MAX_STORM_BYTES = 400 << 20


@pytest.fixture(scope="module")
def group(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGroup]:
    """Two simulated ranks behind a real tokenizer."""
    model = tmp_path_factory.mktemp("no-weights")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2_dir / name, model / name)
    flags = ["--tp", "2", "--step-ms", "1", "--num-blocks", "200", "--max-model-len", "256"]
    folder = tmp_path_factory.mktemp("group")
    with ServedGroup(model, folder, *flags, subcommand="simulate") as served:
        yield served


class Bystander:
    """Asks the same again and again, on a connection of its own; each answer must be the same."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._request = ids_request([5, 6, 7], temperature=0.0, max_tokens=8, ignore_eos=True)
        self.num_answers = 0
        self.is_stopping = False
        self.longest_s = 0.0

    async def run(self) -> None:
        expected: list[int] | None = None
        async with _channel(self._address) as channel:
            stub = generate_pb2_grpc.GenerateServiceStub(channel)
            while not self.is_stopping:
                begun = time.monotonic()
                ids = [
                    token
                    async for event in stub.Generate(self._request, timeout=_LIMIT_S)
                    for token in event.delta.token_ids
                ]
                self.longest_s = max(self.longest_s, time.monotonic() - begun)
                expected = expected or ids
                assert len(ids) == 8 and ids == expected
                self.num_answers += 1
                await asyncio.sleep(0.02)


def _channel(address: str) -> Any:
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(address, options=options)


@contextlib.asynccontextmanager
async def bystander(group: ServedGroup, min_answers: int) -> AsyncIterator[Bystander]:
    """One that is served throughout the block, and at the end was so often enough."""
    one = Bystander(group.address)
    running = asyncio.create_task(one.run())
    try:
        yield one
        async with asyncio.timeout(_LIMIT_S):
            while one.num_answers < min_answers and not running.done():
                await asyncio.sleep(0.02)
    finally:
        one.is_stopping = True
        await running


def assert_intact(group: ServedGroup, epoch: int, members: set[int]) -> None:
    """The same processes in the same epoch; no request and no block is held; no error in the log.

    The engine audits its blocks whenever it is idle, and would end if they were not in order.
    """

    def is_idle() -> bool:
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return all(value_of(group.metrics, f"lockstep_{name}") == 0 for name in names)

    wait_until(is_idle, _LIMIT_S, group.log_text)
    with group.client() as client:
        heartbeats = 2.5  # at least one audit
        until = time.monotonic() + heartbeats
        wait_until(lambda: time.monotonic() > until, _LIMIT_S, group.log_text)
        assert client.server_info().epoch == epoch
        ask(client)
    assert lasting(group) == members
    wait_until(
        lambda: value_of(group.metrics, "lockstep_requests_without_client") == 0,
        _LIMIT_S,
        group.log_text,
    )
    said = group.log_text()
    assert "Traceback" not in said, said[-5000:]


def ask(client: Client) -> None:
    assert client.generate_unary(ids_request([1, 2], max_tokens=3), _LIMIT_S).finished


@pytest.fixture
def intact(group: ServedGroup) -> Iterator[None]:
    """Before and after a test the group is the same and idle."""
    with group.client() as client:
        ask(client)
        epoch = client.server_info().epoch
    members = lasting(group)
    yield
    assert_intact(group, epoch, members)


def lasting(group: ServedGroup) -> set[int]:
    """The daemons' processes, without those that make masks: they come with the first constrained
    request, and a hostile one takes its process with it."""
    lines = {process.pid: " ".join(process.cmdline()) for process in group.members()}
    return {pid for pid, line in lines.items() if "coordinator.grammar" not in line}


def memory_bytes(group: ServedGroup) -> dict[int, int]:
    """Resident bytes of the coordinator's processes, by pid."""
    return {
        process.pid: process.memory_info().rss
        for process in group.members()
        if process.pid in lasting(group)
        and any("coordinator" in word for word in process.cmdline())
    }


async def send_one(channel: Any, rpc: Rpc, rng: random.Random) -> grpc.StatusCode:
    """One hostile call: read to its end, to its deadline, or dropped after some messages."""
    raw = hostile_message(rng, rpc)
    timeout = rng.choice((0.001, 0.05, 1.0, 5.0))
    num_read = rng.choice((0, 1, 3, 1000))
    call = channel.unary_stream(rpc.path)(raw, timeout=timeout)
    try:
        for _ in range(num_read):
            if await call.read() is grpc.aio.EOF:
                break
        else:
            call.cancel()
    except grpc.aio.AioRpcError as error:
        return error.code()
    except asyncio.CancelledError:
        if not call.cancelled():
            raise
    code: grpc.StatusCode = await call.code()
    return code


async def fuzz(address: str, seconds: float, seed: int) -> Counter[tuple[str, str]]:
    """Runs the fuzzers; how many calls ended how. Raises on a status that no bad input explains."""
    seen: Counter[tuple[str, str]] = Counter()
    rpcs = public_rpcs()
    until = time.monotonic() + seconds

    async def run(index: int) -> None:
        rng = random.Random(f"{seed} {index}")
        async with _channel(address) as channel:
            while time.monotonic() < until:
                rpc = rng.choice(rpcs)
                state = rng.getstate()
                code = await send_one(channel, rpc, rng)
                seen[rpc.path, code.name] += 1
                expected = _EXPECTED_OF_HEALTH if "Health" in rpc.path else _EXPECTED
                if code not in expected:
                    rng.setstate(state)
                    raise AssertionError(f"{rpc.path}: {code}, sent {hostile_message(rng, rpc)!r}")

    await asyncio.gather(*(run(index) for index in range(_NUM_FUZZERS)))
    return seen


def check_fuzzed(seen: Counter[tuple[str, str]]) -> None:
    """Every call was reached, and some of ours were served and refused."""
    assert {path for path, _ in seen} == {rpc.path for rpc in public_rpcs()}
    for code in ("OK", "INVALID_ARGUMENT"):
        assert seen[_GENERATE, code] > 0, seen


def test_fuzzed_calls_end_in_a_status_and_harm_nobody(group: ServedGroup, intact: None) -> None:
    async def main() -> Counter[tuple[str, str]]:
        async with bystander(group, min_answers=10):
            return await fuzz(group.address, _SHORT_S, seed=1)

    check_fuzzed(asyncio.run(main()))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_minutes_of_fuzzing_leave_memory_flat(group: ServedGroup, intact: None) -> None:
    async def main(seconds: float, seed: int) -> Counter[tuple[str, str]]:
        async with bystander(group, min_answers=10):
            return await fuzz(group.address, seconds, seed)

    check_fuzzed(asyncio.run(main(_LONG_S / 3, seed=2)))
    before = memory_bytes(group)
    seen = asyncio.run(main(_LONG_S * 2 / 3, seed=3))
    check_fuzzed(seen)
    growth = {pid: now - before[pid] for pid, now in memory_bytes(group).items()}
    print(f"{sum(seen.values())} calls, growth {growth}")
    assert len(growth) == 2 and max(growth.values()) < _MAX_GROWTH_BYTES


@pytest.fixture
def many_files() -> Iterator[None]:
    """This process may open as many files as it is allowed to: a test has 1,000 connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thousand_idle_connections_cost_nobody_anything(
    group: ServedGroup, intact: None, many_files: None
) -> None:
    async def main() -> None:
        async with bystander(group, min_answers=5) as one:
            idle = []
            for _ in range(1000):
                idle.append(await RawConnection.open(group.address))
                idle[-1].hello()
            served = one.num_answers
            while one.num_answers < served + 20:
                await asyncio.sleep(0.02)
            assert not any(connection.is_cut for connection in idle)
            for connection in idle:
                await connection.close()

    asyncio.run(main())


def test_connections_and_calls_that_crawl_hold_nobody_up(
    group: ServedGroup, intact: None, many_files: None
) -> None:
    """Slow loris: prefaces that come a byte at a time, and calls whose message never comes."""

    async def main() -> None:
        async with bystander(group, min_answers=5) as one:
            crawling = [await RawConnection.open(group.address) for _ in range(200)]
            waiting = [await RawConnection.open(group.address) for _ in range(20)]
            for connection in waiting:
                connection.hello()
                for index in range(50):
                    connection.writer.write(call_headers(_GENERATE, 2 * index + 1))
            for index in range(len(PREFACE) - 1):
                for connection in crawling:
                    connection.writer.write(PREFACE[index : index + 1])
                served = one.num_answers
                while one.num_answers == served:
                    await asyncio.sleep(0.01)
            for connection in (*crawling, *waiting):
                await connection.close()

    asyncio.run(main())


def test_storms_of_calls_that_are_opened_and_reset_leave_nothing(
    group: ServedGroup, intact: None
) -> None:
    """As in CVE-2023-44487: streams are cancelled as soon as they are opened."""

    async def main() -> None:
        async with bystander(group, min_answers=20):
            storm = [await RawConnection.open(group.address) for _ in range(8)]
            for connection in storm:
                connection.hello()
            for turn in range(40):
                for connection in storm:
                    if not connection.is_cut:
                        connection.open_and_reset(_GENERATE, 1 + 2 * 50 * turn, 50)
                        with contextlib.suppress(ConnectionError):
                            await connection.writer.drain()
            for connection in storm:
                await connection.close()

    before = memory_bytes(group)
    asyncio.run(main())
    growth = {pid: now - before[pid] for pid, now in memory_bytes(group).items()}
    assert max(growth.values()) < _MAX_STORM_BYTES, growth


def test_serve_gives_its_workers_a_secret_that_strangers_lack(
    group: ServedGroup, intact: None
) -> None:
    with group.client() as client:
        addresses = [rank.address for rank in client.server_info().ranks]
    for address in addresses:
        with grpc.insecure_channel(address) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                stub.Shutdown(worker_pb2.ShutdownRequest(), timeout=_LIMIT_S)
            assert refused.value.code() is _CODE.UNAUTHENTICATED


def test_memory_is_looked_at_where_it_counts(group: ServedGroup) -> None:
    """The engine and its frontend are what hostile clients can make grow."""
    names = [" ".join(psutil.Process(pid).cmdline()) for pid in memory_bytes(group)]
    assert sum("coordinator.frontend" in name for name in names) == 1
    assert len(names) == 2


class _Broken(grpc.GenericRpcHandler):
    """Serves every call, and fails at some messages as code that forgot a case does."""

    def service(self, details: Any) -> Any:
        async def handle(request: bytes, context: Any) -> None:
            if len(request) % 3 == 2:
                raise ValueError("a case that was forgotten")

        return grpc.unary_stream_rpc_method_handler(handle)


def test_a_handler_that_fails_at_some_message_would_be_found() -> None:
    async def main() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((_Broken(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            with pytest.raises(AssertionError, match="UNKNOWN, sent"):
                await fuzz(f"127.0.0.1:{port}", _LIMIT_S, seed=4)
        finally:
            await server.stop(None)

    asyncio.run(main())
