"""What a rank has to say, on its way to the coordinator: results of quick steps travel together.

A message costs the coordinator more than the tokens in it. So a result waits for those of the steps
behind it in its command, but not for long: a step may take its time, or hang.
"""

from __future__ import annotations

import asyncio

from protos.lockstep.v1 import worker_pb2

LONGEST_WAIT_S = 0.006  # as long as the longest grant of several steps takes


class ReportQueue:
    """Reports in order. All on one event loop."""

    def __init__(self, longest_wait_s: float = LONGEST_WAIT_S) -> None:
        self._longest_wait_s = longest_wait_s
        self._ready: asyncio.Queue[worker_pb2.ExecuteResponse] = asyncio.Queue()
        self._waiting: list[worker_pb2.StepResult] = []
        self._timer: asyncio.TimerHandle | None = None

    def put(self, report: worker_pb2.ExecuteResponse, may_wait: bool = False) -> None:
        """Adds a report; `may_wait` is for a result behind which another one is expected soon."""
        if may_wait:
            self._waiting.append(report.result)
            if self._timer is None:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(self._longest_wait_s, self._release)
            return
        if report.HasField("result"):
            self._waiting.append(report.result)
            self._release()
        else:
            self._release()
            self._ready.put_nowait(report)

    async def get(self) -> worker_pb2.ExecuteResponse:
        """The next message to send."""
        return await self._ready.get()

    def _release(self) -> None:
        """Lets go of what waits, as one message."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            *earlier, last = self._waiting
            self._waiting = []
            message = worker_pb2.ExecuteResponse(result=last, earlier_results=earlier)
            self._ready.put_nowait(message)
