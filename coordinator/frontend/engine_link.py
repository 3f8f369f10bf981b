"""The frontend's end of its socket to the engine: frames out, frames in, one stream per request.

Frames are those of coordinator/frames.py. All of this runs on one event loop; no method may be
called from another thread.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from coordinator.frames import framed, take_frames
from coordinator.frontend.errors import EngineLost
from coordinator.frontend.pacer import Pacer
from coordinator.frontend.prompt_pieces import prompt_logprobs
from coordinator.frontend.stream import CallStreams, SampleStream
from protos.lockstep.v1 import engine_pb2

_READ_BYTES = 1 << 18
_ALIVE_PERIOD_S = 1.0
# After a pause of our own process the engine's messages may be waiting unread: look once more.
_SECOND_LOOK_SECONDS = 0.5
# Lowest bit of a handle, set where log-probabilities are wanted: tells which ids in Outputs have
# some, also for a request that we have released and forgotten.
_WANTS_LOGPROBS = 1


class EngineLink:
    """Sends requests to the engine and hands its results to their streams.

    `silence_timeout_s` bounds the time between two messages of the engine, which speaks at least
    once a second. `on_state` and `on_drain` are called on the event loop.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        silence_timeout_s: float,
        on_state: Callable[[engine_pb2.GroupState], None],
        on_drain: Callable[[engine_pb2.Drain], None],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._silence_timeout_s = silence_timeout_s
        self._on_state = on_state
        self._on_drain = on_drain
        self._numbers = itertools.count(1)
        self._queries = itertools.count(1)
        self._streams: dict[int, SampleStream] = {}
        # Released by us; the engine's answer is still to come and somebody waits for it.
        self._released: dict[int, SampleStream] = {}
        self._abort_answers: dict[int, asyncio.Future[bool]] = {}
        # Refused before they were looked at; told once a second, since anybody can cause many.
        self._turned_away: Counter[str] = Counter()
        self._pacer = Pacer()
        self._lost: EngineLost | None = None
        self._last_heard = 0.0

    @property
    def num_streams(self) -> int:
        """Requests that have neither ended nor been released."""
        return len(self._streams)

    async def run(self) -> None:
        """Reads until the engine is lost, then raises EngineLost.

        Every stream and every question in flight ends with the same error.
        """
        self._last_heard = asyncio.get_running_loop().time()
        reading = asyncio.create_task(self._read_frames())
        watching = asyncio.create_task(self._watch_silence())
        telling = asyncio.create_task(self._tell_alive())
        tasks = (reading, watching, telling)
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except EngineLost as error:
            self.fail_all(error)
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def submit(self, messages: Sequence[engine_pb2.Submit], wants_logprobs: bool) -> CallStreams:
        """Sends the samples of one call and returns their streams. Raises EngineLost.

        Their `handle` and `group` are chosen here.
        """
        if self._lost is not None:
            raise self._lost
        handles = [next(self._numbers) << 1 | wants_logprobs for _ in messages]
        call = CallStreams(handles, self._pacer.add)
        for message, stream in zip(messages, call.samples, strict=True):
            message.handle = stream.handle
            message.group = handles[0]
            self._streams[stream.handle] = stream
            self._send(engine_pb2.FrontendMessage(submit=message))
        return call

    def release(self, stream: SampleStream, reason: str, num_output_tokens: int) -> None:
        """Ends a request from our side; whatever the engine still sends for it is dropped.

        All but its answer, an Ended, which comes through the stream until `forget`. Does nothing
        when the engine has ended the request already.
        """
        if self._streams.pop(stream.handle, None) is None:
            return
        self._released[stream.handle] = stream
        self._send(
            engine_pb2.FrontendMessage(
                release=engine_pb2.Release(
                    handle=stream.handle, reason=reason, output_token_count=num_output_tokens
                )
            )
        )

    def forget(self, stream: SampleStream) -> None:
        """Nobody waits any more for what the engine answers to a release."""
        self._released.pop(stream.handle, None)

    async def abort(self, request_id: str, timeout_s: float, tenant: str = "") -> bool:
        """Aborts a tenant's request by name; True if it was in flight.

        Raises EngineLost, also without an answer.
        """
        if self._lost is not None:
            raise self._lost
        query = next(self._queries)
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._abort_answers[query] = answer
        abort = engine_pb2.AbortByName(query=query, request_id=request_id, tenant=tenant)
        self._send(engine_pb2.FrontendMessage(abort=abort))
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise EngineLost(f"the engine did not answer Abort within {timeout_s:g} s") from None
        finally:
            del self._abort_answers[query]

    def report_rejected(self, reason: str) -> None:
        """Counts a request that this frontend refused."""
        rejected = engine_pb2.Rejected(reason=reason, count=1)
        self._send(engine_pb2.FrontendMessage(rejected=rejected))

    def count_turned_away(self, reason: str) -> None:
        """Counts a call whose caller is not known."""
        self._turned_away[reason] += 1

    def report_listening(self, port: int) -> None:
        """Tells the engine that the public port is open."""
        self._send(engine_pb2.FrontendMessage(listening=engine_pb2.Listening(port=port)))

    def fail_all(self, error: EngineLost) -> None:
        """Ends every stream and question with `error`, and refuses new ones with it."""
        self._lost = error
        for stream in (*self._streams.values(), *self._released.values()):
            stream.call.fail(error)
        self._streams.clear()
        self._released.clear()
        for answer in self._abort_answers.values():
            if not answer.done():
                answer.set_exception(error)

    async def close(self) -> None:
        """Sends what is buffered, within a second, and closes the socket."""
        try:
            async with asyncio.timeout(1.0):
                await self._writer.drain()
        except (TimeoutError, OSError):
            pass  # the engine is gone, or does not read: nobody is left to tell
        self._writer.close()

    def _send(self, message: engine_pb2.FrontendMessage) -> None:
        if self._lost is None:
            self._writer.write(framed(message))

    async def _read_frames(self) -> None:
        buffer = bytearray()
        while True:
            try:
                received = await self._reader.read(_READ_BYTES)
            except ConnectionResetError:
                received = b""  # closed with something of ours unread
            except OSError as error:
                raise EngineLost(f"the engine's socket broke: {error}") from None
            if not received:
                raise EngineLost("the engine closed its socket: the coordinator has ended")
            self._last_heard = asyncio.get_running_loop().time()
            buffer += received
            for frame in take_frames(buffer):
                self._dispatch(engine_pb2.EngineMessage.FromString(frame))
            self._pacer.settle()

    async def _watch_silence(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            deadline = self._last_heard + self._silence_timeout_s
            await asyncio.sleep(max(0.0, deadline - loop.time()))
            heard_before = self._last_heard
            if loop.time() - heard_before < self._silence_timeout_s:
                continue
            await asyncio.sleep(_SECOND_LOOK_SECONDS)
            if self._last_heard == heard_before:
                raise EngineLost(
                    f"the engine has said nothing for {self._silence_timeout_s:g} s", is_silent=True
                )

    async def _tell_alive(self) -> None:
        """Says every second how many requests have a client: the engine compares with its own."""
        while True:
            alive = engine_pb2.Alive(stream_count=self.num_streams)
            self._send(engine_pb2.FrontendMessage(alive=alive))
            for reason, count in self._turned_away.items():
                rejected = engine_pb2.Rejected(reason=reason, count=count)
                self._send(engine_pb2.FrontendMessage(rejected=rejected))
            self._turned_away.clear()
            await asyncio.sleep(_ALIVE_PERIOD_S)

    def _dispatch(self, message: engine_pb2.EngineMessage) -> None:
        match message.WhichOneof("message"):
            case "outputs":
                self._dispatch_outputs(message.outputs)
            case "ended":
                self._dispatch_ended(message.ended)
            case "state":
                self._on_state(message.state)
            case "abort_outcome":
                answer = self._abort_answers.get(message.abort_outcome.query)
                if answer is not None and not answer.done():
                    answer.set_result(message.abort_outcome.was_active)
            case "drain":
                self._on_drain(message.drain)
            case other:
                raise AssertionError(f"engine and frontend disagree on EngineMessage: {other}")

    def _dispatch_ended(self, ended: engine_pb2.Ended) -> None:
        stream = self._streams.pop(ended.handle, None) or self._released.pop(ended.handle, None)
        if stream is not None:
            stream.end(ended)

    def _dispatch_outputs(self, outputs: engine_pb2.Outputs) -> None:
        handles = np.frombuffer(outputs.handles, "<i8").tolist()
        counts = np.frombuffer(outputs.token_counts, "<i4").tolist()
        token_ids = np.frombuffer(outputs.token_ids, "<i4").tolist()
        logprobs = list(outputs.logprobs)
        for piece in outputs.prompt_pieces:
            if (stream := self._streams.get(piece.handle)) is not None:
                stream.push_prompt(prompt_logprobs(piece))
        start = logprob_start = 0
        for handle, count in zip(handles, counts, strict=True):
            num_entries = count if handle & _WANTS_LOGPROBS else 0
            stream = self._streams.get(handle)
            if stream is not None:
                stream.push(
                    token_ids[start : start + count],
                    logprobs[logprob_start : logprob_start + num_entries],
                )
            start += count
            logprob_start += num_entries
