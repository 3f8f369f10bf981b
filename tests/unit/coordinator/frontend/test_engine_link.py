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
from coordinator.frontend.stream import SampleStream, StreamUpdate
from protos.lockstep.v1 import engine_pb2
from tests.unit.coordinator.frontend.fake_engine import FakeEngine, within


class Linked:
    """A link under test and the engine at its other end."""

    def __init__(self, engine: FakeEngine, link: EngineLink, running: "asyncio.Task[None]") -> None:
        self.engine = engine
        self.link = link
        self.running = running

    def submit(self, request_id: str = "r", wants_logprobs: bool = False) -> SampleStream:
        """Submits a request of one sample."""
        message = engine_pb2.Submit(request_id=request_id)
        return self.link.submit([message], wants_logprobs).samples[0]


async def taken(stream: SampleStream) -> StreamUpdate:
    """The next update of a call's only sample."""
    (update,) = await within(stream.call.take())
    return update


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
            stream = pair.submit("r")
            ended = engine_pb2.Ended(handle=stream.handle, status_message="x" * 300)
            payload = engine_pb2.EngineMessage(ended=ended).SerializeToString()
            for byte in struct.pack("<I", len(payload)) + payload:
                pair.engine.writer.write(bytes([byte]))
                await asyncio.sleep(0)
            update = await taken(stream)
            assert update.ended == ended

    asyncio.run(main())


def test_handles_never_repeat() -> None:
    async def main() -> None:
        async with linked() as pair:
            handles = [pair.submit(wants_logprobs=index % 3 == 0).handle for index in range(100)]
            assert len(set(handles)) == 100
            assert handles == sorted(handles)

    asyncio.run(main())


def test_what_comes_after_a_release_is_dropped() -> None:
    async def main() -> None:
        async with linked() as pair:
            gone = pair.submit("gone", wants_logprobs=True)
            stays = pair.submit("stays")
            pair.link.release(gone, "stop", 2)
            pair.link.release(gone, "cancelled", 2)
            pair.engine.send_outputs({gone.handle: [1, 2], stays.handle: [3]})
            pair.engine.end(gone.handle)
            assert (await taken(stays)).token_ids == [3]
            answer = await taken(gone)
            assert answer.ended is not None and not answer.token_ids
            assert pair.link.num_streams == 1
            release = await pair.engine.next_release()
            assert (release.handle, release.reason) == (gone.handle, "stop")
            assert pair.engine.releases.empty()

    asyncio.run(main())


def test_forgotten_release_drops_its_answer_too() -> None:
    async def main() -> None:
        async with linked() as pair:
            gone, stays = pair.submit(), pair.submit()
            pair.link.release(gone, "cancelled", 0)
            pair.link.forget(gone)
            pair.engine.end(gone.handle)
            pair.engine.end(stays.handle)
            await taken(stays)
            taking = asyncio.create_task(gone.call.take())
            await asyncio.sleep(0)
            assert not taking.done()
            taking.cancel()

    asyncio.run(main())


def test_samples_of_a_call_share_a_group_and_wake_one_wait() -> None:
    async def main() -> None:
        async with linked() as pair:
            call = pair.link.submit([engine_pb2.Submit() for _ in range(3)], wants_logprobs=True)
            handles = [sample.handle for sample in call.samples]
            submits = [await pair.engine.next_submit() for _ in handles]
            assert [submit.handle for submit in submits] == handles
            assert {submit.group for submit in submits} == {handles[0]}
            pair.engine.send_outputs({handles[2]: [5], handles[0]: [6, 7]})
            updates = await within(call.take())
            assert [(u.sample_index, u.token_ids) for u in updates] == [(2, [5]), (0, [6, 7])]

    asyncio.run(main())


def test_engine_is_told_every_second_how_many_requests_have_a_client() -> None:
    async def main() -> None:
        async with linked() as pair:
            assert await within(pair.engine.stream_counts.get()) == 0
            stays, gone, ended = pair.submit(), pair.submit(), pair.submit()
            assert await within(pair.engine.stream_counts.get()) == 3
            pair.link.release(gone, "stop", 0)
            pair.engine.end(ended.handle)
            await taken(ended)
            assert await within(pair.engine.stream_counts.get()) == 1
            assert stays.num_unread == 0

    asyncio.run(main())


def test_release_after_the_end_says_nothing() -> None:
    async def main() -> None:
        async with linked() as pair:
            stream = pair.submit()
            pair.engine.end(stream.handle)
            await taken(stream)
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
            stream = pair.submit()
            question = asyncio.create_task(pair.link.abort("r", timeout_s=60.0))
            await within(pair.engine.aborts.get())
            pair.engine.close()
            for waiting in (taken(stream), question):
                with pytest.raises(EngineLost, match="closed its socket"):
                    await within(waiting)
            with pytest.raises(EngineLost):
                pair.submit()
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
            stream = pair.submit()
            await asyncio.sleep(0)
            pair.engine.send_outputs({stream.handle: [1]})
            _pause_this_process(0.7)
            assert (await taken(stream)).token_ids == [1]
            pair.engine.send_state()
            await asyncio.wait({pair.running}, timeout=0.7)
            assert not pair.running.done()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def _pause_this_process(seconds: float) -> None:
    """Holds up the event loop, as a stopped process would."""
    time.sleep(seconds)
