"""One Generate or GenerateUnary call between the engine and its client: samples in, events out."""

import asyncio
import contextlib

from coordinator.frontend.engine_link import EngineLink
from coordinator.frontend.errors import EngineLost, RequestFailed
from coordinator.frontend.request_preparer import PreparedRequest
from coordinator.frontend.stream import StreamUpdate
from coordinator.frontend.trailing_metadata import Metadata, times_metadata
from protos.lockstep.v1 import engine_pb2, generate_pb2

_TIMES_TIMEOUT_S = 1.0


class Call:
    """The samples of one call, merged into one flow of events. On the event loop, for one task."""

    def __init__(self, prepared: PreparedRequest, link: EngineLink) -> None:
        """Submits every sample. Raises EngineLost."""
        self._prepared = prepared
        self._link = link
        submits = [] if prepared.is_complete else prepared.submits
        self.streams = link.submit(submits, prepared.wants_logprobs)
        self._unfinished = set(range(len(prepared.outputs)))
        self._unaccepted = set(range(len(submits)))
        self._is_started = False
        # Events that came before the engine had accepted every sample.
        self._held: list[generate_pb2.GenerateResponse] = []
        self._ended: list[engine_pb2.Ended | None] = [None] * len(submits)
        self._failed: engine_pb2.Ended | None = None

    @property
    def num_samples(self) -> int:
        """Outputs of the call."""
        return len(self._prepared.outputs)

    @property
    def is_done(self) -> bool:
        """Every sample's `finished` has been given out."""
        return not self._unfinished

    async def next_events(self) -> list[generate_pb2.GenerateResponse]:
        """Waits for the engine; returns what the client is to get next, perhaps nothing.

        `started` comes once the engine has accepted every sample, then deltas and one `finished` a
        sample. Raises RequestFailed when a sample failed, after what came before it; EngineLost.
        """
        if self._failed is not None:
            raise _failure(self._failed)
        if self._prepared.is_complete:
            self._unfinished.clear()
            finished = self._prepared.outputs[0].finished(None)
            return [self._started_event(), generate_pb2.GenerateResponse(finished=finished)]
        events: list[generate_pb2.GenerateResponse] = []
        for update in await self.streams.take():
            self._take(update, events)
        return events if self._is_started else self._start(events)

    async def wait_for_times(self) -> None:
        """Waits for the engine's word on samples that a stop text ended, at most a second."""
        with contextlib.suppress(TimeoutError, EngineLost):
            async with asyncio.timeout(_TIMES_TIMEOUT_S):
                while None in self._ended:
                    for update in await self.streams.take():
                        self._ended[update.sample_index] = update.ended

    def cached_token_count(self, sample_index: int) -> int:
        """Prompt tokens that a sample found in the prefix cache; 0 while unknown."""
        ended = self._ended[sample_index] if self._ended else None
        return 0 if ended is None else ended.times.cached_token_count

    @property
    def started(self) -> generate_pb2.Started:
        """What the client is told first."""
        return self._prepared.started

    @property
    def num_output_tokens(self) -> int:
        """Generated so far, by all samples."""
        return sum(output.num_output_tokens for output in self._prepared.outputs)

    @property
    def times(self) -> engine_pb2.RequestTimes | None:
        """Where the time of the failed sample, else of sample 0, went; None while unknown."""
        ended = self._failed or (self._ended[0] if self._ended else None)
        return ended.times if ended is not None and ended.HasField("times") else None

    def metadata(self) -> Metadata:
        """`times` for the client; empty while unknown."""
        return () if self.times is None else times_metadata(self.times)

    def close(self, reason: str) -> None:
        """Releases what still runs, with `reason`."""
        for sample, output in zip(self.streams.samples, self._prepared.outputs, strict=False):
            self._link.release(sample, reason, output.num_output_tokens)
            self._link.forget(sample)

    def _take(self, update: StreamUpdate, events: list[generate_pb2.GenerateResponse]) -> None:
        """Turns news of a sample into events, and releases it if a stop text ends it."""
        index, ended = update.sample_index, update.ended
        if ended is not None:
            self._ended[index] = ended
        if index not in self._unfinished:
            return
        output = self._prepared.outputs[index]
        if update.prompt_pieces:
            events += map(_prompt_event, update.prompt_pieces)
        delta = output.push(update)
        if delta is not None:
            events.append(generate_pb2.GenerateResponse(delta=delta))
        is_failed = ended is not None and ended.status_code != 0
        if not is_failed or update.token_ids:
            self._unaccepted.discard(index)
        if output.matched_stop is None and is_failed:
            self._failed = ended
        elif output.matched_stop is not None or ended is not None:
            events.append(generate_pb2.GenerateResponse(finished=output.finished(ended)))
            self._unfinished.discard(index)
            # What a stop text cuts off still runs.
            self._link.release(self.streams.samples[index], "stop", output.num_output_tokens)

    def _start(
        self, events: list[generate_pb2.GenerateResponse]
    ) -> list[generate_pb2.GenerateResponse]:
        """Holds events back until all samples are in; one that is not leaves only its status."""
        self._held += events
        if self._unaccepted:
            if self._failed is not None:
                raise _failure(self._failed)
            return []
        self._is_started = True
        events, self._held = [self._started_event(), *self._held], []
        return events

    def _started_event(self) -> generate_pb2.GenerateResponse:
        return generate_pb2.GenerateResponse(started=self.started)


def _prompt_event(piece: generate_pb2.PromptLogprobs) -> generate_pb2.GenerateResponse:
    return generate_pb2.GenerateResponse(prompt_logprobs=piece)


def _failure(ended: engine_pb2.Ended) -> RequestFailed:
    return RequestFailed(
        ended.status_code, ended.status_message, ended.retry_after_seconds, ended.field
    )
