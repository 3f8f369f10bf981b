"""The public server's options, seen in what they do."""

import asyncio
import contextlib
import dataclasses
import resource
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from coordinator.frontend.health import HealthService
from coordinator.frontend.server import (
    MAX_RECEIVE_BYTES,
    AddressUnavailable,
    ConnectionLimits,
    bind,
    build_server,
    raise_file_limit,
    server_options,
)
from tests.unit.coordinator.frontend.fake_engine import within

_LIMITS = ConnectionLimits(max_connections=64, max_concurrent_streams=64)
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _SETTINGS, _PING, _GOAWAY = 0, 4, 6, 7
_ACK = 1
_MAX_CONCURRENT_STREAMS = 3  # of SETTINGS


@contextlib.asynccontextmanager
async def _server(num_frontends: int = 1, keepalive_s: float = 20.0) -> AsyncIterator[Any]:
    server = build_server((), HealthService(), num_frontends, _LIMITS, keepalive_s)
    try:
        yield server
    finally:
        await server.stop(None)


def test_port_in_use_is_an_error_that_names_it() -> None:
    async def main() -> None:
        async with _server() as server:
            with socket.create_server(("127.0.0.1", 0)) as taken:
                port = taken.getsockname()[1]
                words = f"127.0.0.1:{port}: Address already in use.*--port"
                with pytest.raises(AddressUnavailable, match=words):
                    bind(server, "127.0.0.1", port)

    asyncio.run(main())


def test_host_that_is_not_ours_is_an_error_that_says_so() -> None:
    async def main() -> None:
        async with _server() as server:
            with pytest.raises(AddressUnavailable, match="192.0.2.1:0.*--host"):
                bind(server, "192.0.2.1", 0)

    asyncio.run(main())


def test_second_server_of_its_own_cannot_share_the_port() -> None:
    async def main() -> None:
        async with _server() as first, _server() as second:
            port = bind(first, "127.0.0.1", 0)
            await first.start()
            with pytest.raises(AddressUnavailable):
                bind(second, "127.0.0.1", port)

    asyncio.run(main())


def test_frontends_of_one_coordinator_share_the_port() -> None:
    async def main() -> None:
        async with _server(2) as first, _server(2) as second:
            port = bind(first, "127.0.0.1", 0, num_frontends=2)
            await first.start()
            assert bind(second, "127.0.0.1", port, num_frontends=2) == port
            await second.start()

    asyncio.run(main())


@contextlib.asynccontextmanager
async def _connection(port: int) -> AsyncIterator["_Http2"]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield _Http2(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


class _Http2:
    """Frames to and from a server: enough of RFC 9113 to ping without any call."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        writer.write(_PREFACE)
        self.send(_SETTINGS, 0, b"")

    def send(self, kind: int, flags: int, payload: bytes) -> None:
        self._writer.write(struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + bytes(4))
        self._writer.write(payload)

    async def receive(self) -> tuple[int, int, bytes]:
        header = await self._reader.readexactly(9)
        payload = await self._reader.readexactly(int.from_bytes(header[:3], "big"))
        return header[3], header[4], payload

    async def ping(self, number: int) -> str:
        """Pings and waits for the answer: "pong", or "goaway" with its reason."""
        self.send(_PING, 0, struct.pack(">Q", number))
        while True:
            kind, flags, payload = await self.receive()
            if kind == _SETTINGS and not flags & _ACK:
                self.send(_SETTINGS, _ACK, b"")
            if kind == _GOAWAY:
                return f"goaway {payload[8:].decode()}"
            if kind == _PING and flags & _ACK and struct.unpack(">Q", payload)[0] == number:
                return "pong"
            if kind == _PING and not flags & _ACK:
                self.send(_PING, _ACK, payload)


async def _ping_many(server: Any, num_pings: int) -> list[str]:
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    answers: list[str] = []
    async with _connection(port) as connection:
        try:
            while len(answers) < num_pings and set(answers) <= {"pong"}:
                answers.append(await within(connection.ping(len(answers))))
        except asyncio.IncompleteReadError:
            answers.append("closed")
    return answers


def test_client_that_pings_often_without_calls_is_not_cut() -> None:
    async def main() -> None:
        async with _server() as server:
            assert await _ping_many(server, 20) == ["pong"] * 20

    asyncio.run(main())


def test_stock_server_cuts_such_a_client() -> None:
    """Guards the test above: without our options the same pings end in GOAWAY."""

    async def main() -> None:
        server = grpc.aio.server()
        answers = await _ping_many(server, 20)
        await server.stop(None)
        assert answers[-1] != "pong"
        assert len(answers) < 20

    asyncio.run(main())


def test_client_that_does_not_answer_pings_is_cut() -> None:
    """A client whose host vanished, or whose process hangs, with its connection open."""

    async def main() -> None:
        async with _server(keepalive_s=1.0) as server:
            port = bind(server, "127.0.0.1", 0)
            await server.start()
            frames = []
            async with _connection(port) as connection:
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    while True:
                        frames.append(await within(connection.receive()))
            assert [kind for kind, flags, _ in frames if kind == _PING and not flags & _ACK]

    asyncio.run(main())


def test_only_several_frontends_reuse_the_port() -> None:
    assert dict(server_options(1, _LIMITS))["grpc.so_reuseport"] == 0
    assert dict(server_options(2, _LIMITS))["grpc.so_reuseport"] == 1


@contextlib.asynccontextmanager
async def _limited(limits: ConnectionLimits) -> AsyncIterator[int]:
    """Port of a server whose one call, /x/echo, answers with what it is sent."""

    async def echo(request: bytes, context: Any) -> bytes:
        return request

    handler = grpc.unary_unary_rpc_method_handler(echo)
    handlers = grpc.method_handlers_generic_handler("x", {"echo": handler})
    server = build_server((handlers,), HealthService(), 1, limits)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


async def _settings(connection: "_Http2") -> dict[int, int]:
    """The server's SETTINGS, by identifier (RFC 9113, 6.5.2)."""
    while True:
        kind, flags, payload = await within(connection.receive())
        if kind == _SETTINGS and not flags & _ACK:
            return dict(struct.iter_unpack(">HI", payload))


def test_a_connection_is_told_how_many_calls_it_may_have_open() -> None:
    async def main() -> None:
        limits = dataclasses.replace(_LIMITS, max_concurrent_streams=7)
        async with _limited(limits) as port, _connection(port) as connection:
            assert (await _settings(connection))[_MAX_CONCURRENT_STREAMS] == 7

    asyncio.run(main())


def test_connections_beyond_the_limit_are_closed_and_those_within_are_served() -> None:
    async def main() -> None:
        limits = dataclasses.replace(_LIMITS, max_connections=3)
        async with _limited(limits) as port, contextlib.AsyncExitStack() as opened:
            kept = []
            for _ in range(3):
                kept.append(await opened.enter_async_context(_connection(port)))
                await _settings(kept[-1])
            for _ in range(5):
                async with _connection(port) as refused:
                    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                        await within(refused.receive())
            assert [await within(one.ping(1)) for one in kept] == ["pong"] * 3

    asyncio.run(main())


@pytest.mark.parametrize(
    ("message", "metadata"),
    [(b"x" * (MAX_RECEIVE_BYTES + 1), ()), (b"x", (("padding", "x" * (20 << 10)),))],
    ids=["message", "metadata"],
)
def test_what_is_too_large_is_refused_and_the_connection_goes_on(
    message: bytes, metadata: Any
) -> None:
    async def main() -> None:
        async with _limited(_LIMITS) as port:
            options = [("grpc.enable_http_proxy", 0), ("grpc.max_send_message_length", -1)]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
                call = channel.unary_unary("/x/echo")
                with pytest.raises(grpc.aio.AioRpcError) as ended:
                    await within(call(message, metadata=metadata))
                assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert await within(call(b"x")) == b"x"

    asyncio.run(main())


def test_as_many_files_may_be_open_as_connections() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        raise_file_limit(1000)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 1000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
