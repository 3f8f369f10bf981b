"""A streaming call of the synchronous client."""

import threading
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Self

import grpc

from lockstep.client.pauses import Pauses
from lockstep.client.progress import StreamProgress
from lockstep.client.results import Delta, Finished, PromptLogprobs, Started
from lockstep.client.retries import Retries
from lockstep.client.statuses import call_failed
from lockstep.errors import CallFailed
from protos.lockstep.v1 import generate_pb2

OpenCall = Callable[[generate_pb2.GenerateRequest, float], Any]
"""Sends a request with a limit in seconds; gives gRPC's call."""


class Generation:
    """Iterate it for its deltas. Leaving the loop and dropping it, or `close`, cancels the call.

    The call is under way once this exists. For one thread, save `cancel`. Errors are CallFailed and
    come from the iteration.
    """

    def __init__(
        self, progress: StreamProgress, retries: Retries, open_call: OpenCall, pauses: Pauses
    ) -> None:
        self._progress = progress
        self._attempt = _Attempt(pauses)
        self._attempt.begin(lambda: open_call(progress.next_message(), retries.remaining_s()))
        # Not a method: it would hold this object, and dropping it would not cancel the call.
        self._deltas = _deltas(progress, retries, open_call, self._attempt)

    @property
    def started(self) -> Started | None:
        """There with the first delta. After a retry or a resume: of the last attempt."""
        return self._progress.started

    @property
    def finished(self) -> Finished | None:
        """Of sample 0; complete after the last delta."""
        return self._progress.finished.get(0)

    @property
    def finished_samples(self) -> dict[int, Finished]:
        """Of each sample, by index; complete after the last delta."""
        return self._progress.finished

    @property
    def prompt_logprobs(self) -> PromptLogprobs | None:
        """If asked for, complete with the first delta."""
        return self._progress.prompt_logprobs

    @property
    def times(self) -> dict[str, str]:
        """Where the time of the last attempt went, by key ("lockstep-queue-ms", ...).

        There after the last delta, and after an error of the server's.
        """
        return self._progress.times

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        return next(self._deltas)

    def cancel(self) -> None:
        """Ends the call; whoever iterates it gets Cancelled. Any thread."""
        self._attempt.cancel()

    def close(self) -> None:
        """Ends the call and the iteration. Idempotent."""
        self._attempt.cancel()
        self._deltas.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Attempt:
    """The call in flight, replaced by the next attempt, cancelled from any thread."""

    def __init__(self, pauses: Pauses) -> None:
        self._pauses = pauses
        self._lock = threading.Lock()
        self._is_cancelled = False
        self.call: Any = None

    def begin(self, open_call: Callable[[], Any]) -> None:
        """Raises Cancelled if it has been cancelled or the client closed."""
        with self._lock:
            self._pauses.check(lambda: self._is_cancelled)
            self.call = open_call()

    def cancel(self) -> None:
        with self._lock:
            self._is_cancelled = True
            self.call.cancel()
        self._pauses.wake()

    def pause(self, seconds: float) -> None:
        self._pauses.pause(seconds, lambda: self._is_cancelled)


def _deltas(
    progress: StreamProgress, retries: Retries, open_call: OpenCall, attempt: _Attempt
) -> Generator[Delta]:
    """All attempts' deltas, one after the other. Closing it cancels what is in flight."""
    failed: CallFailed | None = None
    while True:
        try:
            if failed is not None:
                attempt.pause(retries.delay_s(failed))
                attempt.begin(lambda: open_call(progress.next_message(), retries.remaining_s()))
            for delta in _attempt_deltas(progress, attempt.call):
                retries.note_progress()
                yield delta
            return
        except grpc.RpcError as error:
            failed = call_failed(error)
        if progress.is_complete:
            return  # all that was lost is the status
        if not progress.may_retry:
            raise failed


def _attempt_deltas(progress: StreamProgress, call: Any) -> Generator[Delta]:
    try:
        for event in call:
            delta = progress.take(event)
            if delta is not None:
                yield delta
        progress.check_complete()
    finally:
        call.cancel()  # without effect once it has ended
        if call.done():
            progress.note_times(call.trailing_metadata())
