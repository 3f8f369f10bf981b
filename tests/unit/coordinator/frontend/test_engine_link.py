"""The socket to the engine: frames in pieces, releases that cross, questions without an answer."""

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import AsyncIterator

import pytest
import uvloop

from coordinator.frontend.engine_link import EngineLink
from coordinator.frontend.errors import EngineLost
from protos.lockstep.v1 import engine_pb2
from tests.unit.coordinator.frontend.fake_engine import FakeEngine, within


class Linked:
    """A link under test and the engine at its other end."""

    def __init__(self, engine: FakeEngine, link: EngineLink, running: "asyncio.Task[None]") -> None:
        self.engine = engine
        self.link = link
        self.running = running


@contextlib.asynccontextmanager
async def linked(silence_timeout_s: float = 60.0) -> AsyncIterator[Linked]:
    """Runs a link for the length of the block."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    engine = FakeEngine(*await asyncio.open_unix_connection(sock=ours))
    listening = asyncio.create_task(engine.listen())
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    link = EngineLink(reader, writer, silence_timeout_s, lambda state: None, lambda budget: None)
    running = asyncio.create_task(link.run())
    try:
        yield Linked(engine, link, running)
    finally:
        engine.close()
        await within(asyncio.wait({running}))
        await link.close()
        await within(listening)
        running.exception()


def test_frames_that_arrive_byte_by_byte_are_put_together() -> None:
    async def main() -> None:
        async with linked() as pair:
            stream = pair.link.submit(engine_pb2.Submit(request_id="r"), wants_logprobs=False)
            ended = engine_pb2.Ended(handle=stream.handle, status_message="x" * 300)
            payload = engine_pb2.EngineMessage(ended=ended).SerializeToString()
            for byte in struct.pack("<I", len(payload)) + payload:
                pair.engine.writer.write(bytes([byte]))
                await asyncio.sleep(0)
            update = await within(stream.take())
            assert update.ended == ended

    asyncio.run(main())


def test_handles_never_repeat() -> None:
    async def main() -> None:
        async with linked() as pair:
            handles = [
                pair.link.submit(engine_pb2.Submit(), wants_logprobs=index % 3 == 0).handle
                for index in range(100)
            ]
            assert len(set(handles)) == 100
            assert handles == sorted(handles)

    asyncio.run(main())


def test_what_comes_after_a_release_is_dropped() -> None:
    async def main() -> None:
        async with linked() as pair:
            gone = pair.link.submit(engine_pb2.Submit(request_id="gone"), wants_logprobs=True)
            stays = pair.link.submit(engine_pb2.Submit(request_id="stays"), wants_logprobs=False)
            pair.link.release(gone, "stop", 2)
            pair.link.release(gone, "cancelled", 2)
            pair.engine.send_outputs({gone.handle: [1, 2], stays.handle: [3]})
            pair.engine.end(gone.handle)
            assert (await within(stays.take())).token_ids == [3]
            assert pair.link.num_streams == 1
            release = await pair.engine.next_release()
            assert (release.handle, release.reason) == (gone.handle, "stop")
            assert pair.engine.releases.empty()

    asyncio.run(main())


def test_release_after_the_end_says_nothing() -> None:
    async def main() -> None:
        async with linked() as pair:
            stream = pair.link.submit(engine_pb2.Submit(), wants_logprobs=False)
            pair.engine.end(stream.handle)
            await within(stream.take())
            pair.link.release(stream, "cancelled", 0)
            pair.link.report_rejected("marker")
            await within(pair.engine.rejections_arrived.wait())
            assert pair.engine.releases.empty()

    asyncio.run(main())


def test_abort_without_an_answer_gives_up() -> None:
    async def main() -> None:
        async with linked() as pair:
            with pytest.raises(EngineLost, match="Abort within 0.05 s"):
                await within(pair.link.abort("r", timeout_s=0.05))

    asyncio.run(main())


def test_lost_engine_fails_what_waits_and_what_comes() -> None:
    async def main() -> None:
        async with linked() as pair:
            stream = pair.link.submit(engine_pb2.Submit(), wants_logprobs=False)
            question = asyncio.create_task(pair.link.abort("r", timeout_s=60.0))
            await within(pair.engine.aborts.get())
            pair.engine.close()
            for waiting in (stream.take(), question):
                with pytest.raises(EngineLost, match="closed its socket"):
                    await within(waiting)
            with pytest.raises(EngineLost):
                pair.link.submit(engine_pb2.Submit(), wants_logprobs=False)
            with pytest.raises(EngineLost):
                await pair.link.abort("r", timeout_s=1.0)
            await within(asyncio.wait({pair.running}))
            error = pair.running.exception()
            assert isinstance(error, EngineLost) and not error.is_silent

    asyncio.run(main())


def test_messages_unread_during_our_own_pause_count_as_heard() -> None:
    """On the loop that the process runs on, which looks at its timers before its sockets."""

    async def main() -> None:
        async with linked(silence_timeout_s=0.5) as pair:
            stream = pair.link.submit(engine_pb2.Submit(), wants_logprobs=False)
            await asyncio.sleep(0)
            pair.engine.send_outputs({stream.handle: [1]})
            _pause_this_process(0.7)
            assert (await within(stream.take())).token_ids == [1]
            pair.engine.send_state()
            await asyncio.wait({pair.running}, timeout=0.7)
            assert not pair.running.done()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def _pause_this_process(seconds: float) -> None:
    """Holds up the event loop, as a stopped process would."""
    time.sleep(seconds)
