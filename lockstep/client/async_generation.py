"""A streaming call of the asynchronous client."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Any, Self

import grpc

from lockstep.client.progress import StreamProgress
from lockstep.client.results import Delta, Finished, PromptLogprobs, Started
from lockstep.client.retries import Retries
from lockstep.client.statuses import call_failed, failure
from lockstep.errors import CallFailed
from protos.lockstep.v1 import generate_pb2

OpenCall = Callable[[generate_pb2.GenerateRequest, float], Any]
"""Sends a request with a limit in seconds; gives gRPC's call."""


class AsyncGeneration:
    """Iterate it for its deltas; `aclose`, `async with` and a cancelled task end the call.

    The call is under way once this exists. For one task. Errors are CallFailed and come from the
    iteration.
    """

    def __init__(self, progress: StreamProgress, retries: Retries, open_call: OpenCall) -> None:
        self._progress = progress
        self._first_call = open_call(progress.next_message(), retries.remaining_s())
        self._deltas = _deltas(progress, retries, open_call, self._first_call)

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

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        return await anext(self._deltas)

    async def aclose(self) -> None:
        """Ends the call and the iteration. Idempotent."""
        self._first_call.cancel()  # also if nothing was iterated
        await self._deltas.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


async def _deltas(
    progress: StreamProgress, retries: Retries, open_call: OpenCall, call: Any
) -> AsyncGenerator[Delta]:
    """All attempts' deltas, one after the other. Closing it cancels what is in flight."""
    failed: CallFailed | None = None
    while True:
        try:
            if failed is not None:
                await asyncio.sleep(retries.delay_s(failed))
                call = open_call(progress.next_message(), retries.remaining_s())
            async for event in call:
                delta = progress.take(event)
                if delta is not None:
                    retries.note_progress()
                    yield delta
            progress.note_times(await call.trailing_metadata())
            progress.check_complete()
            return
        except grpc.RpcError as error:
            failed = call_failed(error)
            progress.note_times(error.trailing_metadata())
        except asyncio.CancelledError:
            raise_if_not_the_tasks_own()
            raise
        finally:
            call.cancel()  # without effect once it has ended
        if progress.is_complete:
            return  # all that was lost is the status
        if not progress.may_retry:
            raise failed


def raise_if_not_the_tasks_own() -> None:
    """Raises Cancelled for a CancelledError that is gRPC's word for a call that we cancelled."""
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        raise failure("CANCELLED", "the client was closed") from None
