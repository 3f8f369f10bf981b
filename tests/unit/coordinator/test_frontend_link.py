"""Frames between engine and frontend, and frontends that misbehave."""

import asyncio
import os
import signal
import socket
import sys
from typing import Any, cast

import pytest

from coordinator import frontend_link
from coordinator.errors import FrontendLost
from coordinator.frontend_link import ChildProcess, FrontendLink, FrontendProcess, open_link
from protos.lockstep.v1 import engine_pb2
from tests.helpers.engine_harness import LIMIT_S


def frame(message: engine_pb2.FrontendMessage) -> bytes:
    payload = message.SerializeToString()
    return len(payload).to_bytes(4, "little") + payload


async def linked(heard: list[engine_pb2.FrontendMessage]) -> tuple[FrontendLink, socket.socket]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    return await open_link(3, ours, lambda index, message: heard.append(message)), theirs


def test_frames_cut_anywhere_come_through_whole_and_in_order() -> None:
    async def run() -> None:
        heard: list[engine_pb2.FrontendMessage] = []
        link, theirs = await linked(heard)
        sent = [
            engine_pb2.FrontendMessage(listening=engine_pb2.Listening(port=port))
            for port in range(1, 50)
        ]
        stream = b"".join(frame(message) for message in sent)
        reading = asyncio.create_task(link.read_all())
        loop = asyncio.get_running_loop()
        for start in range(0, len(stream), 7):
            await loop.sock_sendall(theirs, stream[start : start + 7])
        theirs.close()
        async with asyncio.timeout(LIMIT_S):
            await reading
        assert heard == sent
        link.close()

    asyncio.run(run())


class Writer:
    """Keeps what is written, write by write."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.transport = self

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, written: bytes) -> None:
        self.writes.append(written)


def test_what_is_sent_together_is_one_write_of_whole_frames() -> None:
    async def run() -> None:
        writer = Writer()
        link = FrontendLink(
            0, asyncio.StreamReader(), cast(Any, writer), lambda index, message: None
        )
        sent = [
            engine_pb2.EngineMessage(ended=engine_pb2.Ended(handle=handle)) for handle in (1, 2, 3)
        ]
        link.send(*sent)
        packed = [message.SerializeToString() for message in sent]
        assert writer.writes == [b"".join(len(p).to_bytes(4, "little") + p for p in packed)]

    asyncio.run(run())


def test_a_frame_that_ends_early_is_the_end() -> None:
    async def run() -> None:
        heard: list[engine_pb2.FrontendMessage] = []
        link, theirs = await linked(heard)
        theirs.send(frame(engine_pb2.FrontendMessage())[:3])
        theirs.close()
        async with asyncio.timeout(LIMIT_S):
            await link.read_all()
        assert heard == []
        link.close()

    asyncio.run(run())


def test_a_frontend_that_stops_reading_is_dropped_and_does_not_stop_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frontend_link, "_MAX_UNSENT_BYTES", 1 << 20)

    async def run() -> None:
        link, theirs = await linked([])
        reading = asyncio.create_task(link.read_all())
        big = engine_pb2.EngineMessage(outputs=engine_pb2.Outputs(token_ids=bytes(1 << 19)))
        for _ in range(8):
            link.send(big)
        async with asyncio.timeout(LIMIT_S):
            await reading
        theirs.close()

    asyncio.run(run())


class FakeProcess:
    """Ends only when killed."""

    def __init__(self) -> None:
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        self._ended.set_result(-signal.SIGKILL)


def test_a_frontend_that_closes_its_socket_and_hangs_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frontend_link, "_EXIT_TIMEOUT_S", 0.05)

    async def run() -> None:
        link, theirs = await linked([])
        frontend = FrontendProcess(link, FakeProcess())
        theirs.close()
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(FrontendLost, match="frontend 3 ended with exit code -9"):
                await frontend.run()
        link.close()

    asyncio.run(run())


def test_a_child_process_is_awaited_again_after_a_wait_that_was_given_up() -> None:
    async def run() -> None:
        reads, writes = os.pipe()
        child = ChildProcess([sys.executable, "-c", f"import os; os.read({reads}, 1)"], (reads,))
        os.close(reads)
        try:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(child.wait(), 0.05)
            child.kill()
            async with asyncio.timeout(LIMIT_S):
                assert await child.wait() == await child.wait() == -signal.SIGKILL
            child.kill()
        finally:
            os.close(writes)

    asyncio.run(run())
