"""What happens when a rank is lost: find the root, end the epoch on every rank, count."""

import asyncio
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import grpc

from coordinator.errors import RankLost, StartRefused
from coordinator.worker_group import WorkerClient
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.process_identity import boot_id, start_ticks
from protos.lockstep.v1 import worker_pb2

_LOG = logging.getLogger(__name__)
_QUIESCE_TIMEOUT_S = 2.0
_SHUTDOWN_TIMEOUT_S = 2.0
_GONE_TIMEOUT_S = 10.0
_MAX_FAILURES = 3
_FAILURE_WINDOW_S = 600.0
# Errors of a rank that waited for another one, by the name they begin with.
_WAITED = ("CommAborted", "CommTimeout", "the coordinator abandoned")


class FailureBudget:
    """Three lost groups in ten minutes are more than a restart mends."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=_MAX_FAILURES)

    def spend(self, problem: str) -> None:
        """Counts a failure; raises StartRefused with GROUP_LOST when there were too many."""
        now = time.monotonic()
        self._times.append(now)
        if len(self._times) == _MAX_FAILURES and now - self._times[0] < _FAILURE_WINDOW_S:
            raise StartRefused(
                ExitCode.GROUP_LOST,
                f"{_MAX_FAILURES} failures in {now - self._times[0]:.0f} s; the last: {problem}",
            )


@dataclass(frozen=True)
class RootCause:
    """The rank that failed, and what it said."""

    rank: int
    step: int
    problem: str

    def __str__(self) -> str:
        return f"rank {self.rank} lost at step {self.step}: {self.problem}"


async def quiesce(
    workers: Sequence[WorkerClient], epoch: int
) -> list[worker_pb2.QuiesceResponse | None]:
    """Abandons the epoch on all ranks at once; None for a rank that does not answer."""

    async def ask(worker: WorkerClient) -> worker_pb2.QuiesceResponse | None:
        try:
            answer: worker_pb2.QuiesceResponse = await worker.call(
                "Quiesce",
                worker_pb2.QuiesceRequest(epoch=epoch),
                worker_pb2.QuiesceResponse,
                _QUIESCE_TIMEOUT_S,
            )
        except grpc.aio.AioRpcError as error:
            _LOG.warning(
                "rank %d does not answer Quiesce: %s %s",
                worker.rank,
                error.code().name,
                error.details(),
                extra={"rank": worker.rank, "epoch": epoch},
            )
            return None
        return answer

    return await asyncio.gather(*(ask(worker) for worker in workers))


def find_root(
    lost: RankLost,
    answers: Sequence[worker_pb2.QuiesceResponse | None],
    behind: Sequence[int] = (),
) -> RootCause:
    """Names the rank that failed or does not answer, not the one that waited for it.

    In this order: a rank that does not answer; one with an error of its own; one that is `behind`
    by the ranks' records of their collectives; one whose device does not stop; the one that showed
    the loss. Among equals the one that showed it, then the lowest.
    """
    silent = [rank for rank, answer in enumerate(answers) if answer is None]
    failed = [
        rank
        for rank, answer in enumerate(answers)
        if answer is not None and answer.last_error and not _has_waited(answer.last_error)
    ]
    stuck = [
        rank for rank, answer in enumerate(answers) if answer is not None and not answer.is_drained
    ]
    candidates = silent or failed or behind or stuck or [lost.rank]
    root = lost.rank if lost.rank in candidates else candidates[0]
    answer = answers[root]
    if answer is None:
        seen = f"it does not answer (seen at rank {lost.rank}: {lost.problem})"
        problem = lost.problem if root == lost.rank else seen
        return RootCause(root, lost.step, problem)
    if root == lost.rank:
        step = lost.step or answer.last_step + 1
        if root not in failed or answer.last_error in lost.problem:
            return RootCause(root, step, lost.problem)
        return RootCause(root, step, f"{answer.last_error} ({lost.problem})")
    seen = f"the others wait for it (seen at rank {lost.rank}: {lost.problem})"
    problem = answer.last_error if root in failed else ""
    return RootCause(
        root,
        answer.last_step + 1,
        problem or (seen if root in behind else answer.last_error) or "its device does not stop",
    )


def _has_waited(error: str) -> bool:
    return error.startswith(_WAITED)


async def end_workers(
    workers: Sequence[WorkerClient],
    hellos: Sequence[worker_pb2.HelloResponse],
    is_answering: Sequence[bool],
    reason: str,
) -> None:
    """Kills ranks of this host that do not answer, tells the others to end, waits until they have.

    Whatever supervises the workers starts them again. `hellos` is empty if there were none.
    """
    for worker, hello, answers in zip(workers, hellos, is_answering, strict=False):
        if not answers:
            kill_if_local(worker.rank, hello)
    await shut_down_workers(workers, reason, _GONE_TIMEOUT_S)


async def shut_down_workers(
    workers: Sequence[WorkerClient], reason: str, gone_timeout_s: float
) -> None:
    """Tells workers to end and waits that long for it."""
    await asyncio.gather(*(_shut_down(worker, reason, gone_timeout_s) for worker in workers))


async def _shut_down(worker: WorkerClient, reason: str, gone_timeout_s: float) -> None:
    with suppress(grpc.aio.AioRpcError):  # gone already, which is what is wanted
        await worker.call(
            "Shutdown",
            worker_pb2.ShutdownRequest(reason=reason),
            worker_pb2.ShutdownResponse,
            _SHUTDOWN_TIMEOUT_S,
        )
        # A process on its way out still answers Hello; the next epoch must not begin with it.
        if not await worker.wait_until_gone(gone_timeout_s):
            _LOG.warning("rank %d is still up %g s after Shutdown", worker.rank, gone_timeout_s)


def kill_if_local(rank: int, hello: worker_pb2.HelloResponse) -> bool:
    """Kills a worker's process if boot, pid and start time are those that it told in Hello."""
    if hello.boot_id != boot_id() or start_ticks(hello.pid) != hello.pid_start_ticks:
        return False
    _LOG.warning("killing rank %d, process %d", rank, hello.pid)
    try:
        os.kill(hello.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
