"""The public server's options, seen in what they do."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from coordinator.frontend.health import HealthService
from coordinator.frontend.server import AddressUnavailable, bind, build_server, server_options
from tests.unit.coordinator.frontend.fake_engine import within

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _SETTINGS, _PING, _GOAWAY = 0, 4, 6, 7
_ACK = 1


def _empty_handler() -> grpc.GenericRpcHandler:
    return grpc.method_handlers_generic_handler("lockstep.v1.GenerateService", {})


@contextlib.asynccontextmanager
async def _server(num_frontends: int = 1, keepalive_s: float = 20.0) -> AsyncIterator[Any]:
    server = build_server(_empty_handler(), HealthService(), num_frontends, keepalive_s)
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
    assert dict(server_options(1))["grpc.so_reuseport"] == 0
    assert dict(server_options(2))["grpc.so_reuseport"] == 1
