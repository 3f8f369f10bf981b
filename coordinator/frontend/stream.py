"""What the engine has said about one request and its RPC has not yet taken."""

import asyncio
from dataclasses import dataclass

from coordinator.frontend.errors import EngineLost
from protos.lockstep.v1 import engine_pb2, generate_pb2


@dataclass(frozen=True)
class StreamUpdate:
    """Everything that had queued for a request.

    `logprobs` has one entry per id, or none. `ended` is set once, in the last update.
    """

    token_ids: list[int]
    logprobs: list[generate_pb2.TokenLogprobs]
    ended: engine_pb2.Ended | None


class RequestStream:
    """Queue between the engine's socket (push, end, fail) and one RPC (take), on one event loop.

    While the client's socket is busy, tokens gather here and the next `take` returns them all. The
    queue holds at most `max_tokens` ids: a client that does not read costs their memory, no more.
    """

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self._token_ids: list[int] = []
        self._logprobs: list[generate_pb2.TokenLogprobs] = []
        self._ended: engine_pb2.Ended | None = None
        self._error: EngineLost | None = None
        self._arrived = asyncio.Event()

    def push(self, token_ids: list[int], logprobs: list[generate_pb2.TokenLogprobs]) -> None:
        """Adds output; no ids at all means that the engine has accepted the request."""
        self._token_ids += token_ids
        self._logprobs += logprobs
        self._arrived.set()

    def end(self, ended: engine_pb2.Ended) -> None:
        """Adds the engine's last word."""
        self._ended = ended
        self._arrived.set()

    def fail(self, error: EngineLost) -> None:
        """The engine is lost: what has queued is given out first, then `take` raises `error`."""
        self._error = error
        self._arrived.set()

    async def take(self) -> StreamUpdate:
        """Waits for something and returns all there is. Raises EngineLost.

        The wait is bounded by the engine's silence limit, which ends in `fail`.
        """
        await self._arrived.wait()
        if self._error is not None and not self._token_ids and self._ended is None:
            raise self._error
        update = StreamUpdate(self._token_ids, self._logprobs, self._ended)
        self._token_ids, self._logprobs = [], []
        if self._error is None and self._ended is None:
            self._arrived.clear()
        return update
