"""What the engine has said about one call's samples and its RPC has not yet taken."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coordinator.errors import CoordinatorError
from protos.lockstep.v1 import engine_pb2, generate_pb2


@dataclass(slots=True)
class StreamUpdate:
    """Everything that had queued for a sample.

    `logprobs` has one entry per id, or none. `ended` is set once, in the sample's last update.
    `prompt_pieces` come before the ids.
    """

    sample_index: int
    token_ids: list[int]
    logprobs: list[generate_pb2.TokenLogprobs]
    ended: engine_pb2.Ended | None
    prompt_pieces: Sequence[generate_pb2.PromptLogprobs] = ()


class SampleStream:
    """One sample's queue: the engine's socket pushes and ends, `CallStreams.take` empties it."""

    __slots__ = ("_has_begun", "_update", "call", "handle", "sample_index")

    def __init__(self, call: "CallStreams", sample_index: int, handle: int) -> None:
        self.handle = handle
        self.sample_index = sample_index
        self.call = call
        self._has_begun = False
        self._update: StreamUpdate | None = None

    @property
    def num_unread(self) -> int:
        """Ids that queue."""
        return 0 if self._update is None else len(self._update.token_ids)

    def push(
        self, token_ids: Sequence[int], logprobs: Sequence[generate_pb2.TokenLogprobs]
    ) -> None:
        """Adds output; no ids at all means that the engine has accepted the request.

        Whoever waits for a first token waits for nothing to join it.
        """
        update = self._queued()
        update.token_ids += token_ids
        update.logprobs += logprobs
        if token_ids and not self._has_begun:
            self._has_begun = True
            self.call.wake()

    def push_prompt(self, piece: generate_pb2.PromptLogprobs) -> None:
        """Adds log-probabilities of a piece of the prompt."""
        update = self._queued()
        update.prompt_pieces = (*update.prompt_pieces, piece)

    def end(self, ended: engine_pb2.Ended) -> None:
        """Adds the engine's last word."""
        self._queued().ended = ended

    def taken(self) -> StreamUpdate:
        """Empties the queue, which holds something."""
        update, self._update = self._update, None
        assert update is not None
        return update

    def _queued(self) -> StreamUpdate:
        update = self._update
        if update is None:
            update = self._update = StreamUpdate(self.sample_index, [], [], None)
            self.call.arrive(self)
        return update


class CallStreams:
    """The queues of one call's samples, and its RPC's wait for news of any. On one event loop.

    While the client's transport is busy, tokens gather here and the next `take` returns them all.
    """

    def __init__(
        self, handles: Sequence[int], on_news: Callable[[Callable[[], None]], None]
    ) -> None:
        """`on_news` is told when something queues again, and calls what it is given: `wake`."""
        self.samples = [SampleStream(self, index, handle) for index, handle in enumerate(handles)]
        self.unread_since: float | None = None
        """CLOCK_MONOTONIC when too much was first seen to queue since the last `take`."""
        self._on_news = on_news
        self._news: list[SampleStream] = []
        self._is_awake = False
        self._error: CoordinatorError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def num_unread(self) -> int:
        """Ids that queue, of all samples."""
        return sum(sample.num_unread for sample in self._news)

    def arrive(self, sample: SampleStream) -> None:
        """A sample has something to take."""
        self._news.append(sample)
        if len(self._news) == 1:
            self._on_news(self.wake)

    def wake(self) -> None:
        """Lets `take` return what there is, if it has not yet."""
        if not self._news and self._error is None:
            return
        self._is_awake = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, error: CoordinatorError) -> None:
        """No more will come: what has queued is given out first, then `take` raises `error`."""
        self._error = error
        self.wake()

    async def take(self) -> list[StreamUpdate]:
        """Waits for something and returns all there is, at most one update a sample.

        For one task. The wait is bounded by the engine's silence limit, which ends in `fail`.
        """
        if not self._is_awake:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if not self._news:
            assert self._error is not None
            raise self._error
        updates = [sample.taken() for sample in self._news]
        self._news.clear()
        self._is_awake = self._error is not None
        self.unread_since = None
        return updates
