"""Groups of real daemons to break: who is who, streams in flight, and groups that are used up."""

from __future__ import annotations

import concurrent.futures
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lockstep.errors import CallFailed
from tests.helpers.message_client import Client, ids_request
from tests.helpers.served_group import ServedGroup

STEP_TIMEOUT_S = 3.0
# What the issue grants a client whose rank or coordinator was lost.
END_LIMIT_S = STEP_TIMEOUT_S + 5.0
NUM_STREAMS = 8
# More than a step time-out's worth of tokens, so that no stream ends by itself.
ENDLESS = 30_000
RECOVERY_LIMIT_S = 60.0
_CALL_LIMIT_S = 90.0
_UNDER_WAY_LIMIT_S = 30.0
# Tokens after which a stream counts as running: prefill is over, commands run ahead of results.
_UNDER_WAY = 16
_POLL_S = 0.05
# Losses that a group survives: the third one in ten minutes ends it.
_MAX_LOSSES = 2
FLAGS = (
    *("--tp", "2", "--num-threads", "1", "--dtype", "float32"),
    *("--step-timeout", f"{STEP_TIMEOUT_S:g}", "--drain-seconds", "30"),
    *("--max-num-seqs", "16", "--kv-cache-bytes", "64M"),
)


@dataclass(frozen=True)
class StreamEnd:
    """How a stream ended: `error` is None if it was served to its last token."""

    num_tokens: int
    error: CallFailed | None
    ended_at: float


class RunningStreams:
    """Generations that have all had some tokens, and run on."""

    def __init__(self, address: str, num_streams: int, max_tokens: int) -> None:
        self._client = Client(address)
        self._pool = concurrent.futures.ThreadPoolExecutor(num_streams)
        self._under_way = threading.Semaphore(0)
        self._runs = [self._pool.submit(self._run, n, max_tokens) for n in range(num_streams)]
        deadline = time.monotonic() + _UNDER_WAY_LIMIT_S
        for _ in self._runs:
            got = self._under_way.acquire(timeout=max(0.0, deadline - time.monotonic()))
            assert got, "a stream does not get its first tokens"

    def ends(self, limit_s: float) -> Sequence[StreamEnd]:
        """How each stream ended; fails if one has not within `limit_s`."""
        _, open_runs = concurrent.futures.wait(self._runs, limit_s)
        assert not open_runs, f"{len(open_runs)} streams are open after {limit_s:g} s"
        return [run.result() for run in self._runs]

    def close(self) -> None:
        """Drops what still runs."""
        self._client.close()
        self._pool.shutdown()

    def _run(self, number: int, max_tokens: int) -> StreamEnd:
        request = ids_request(
            [3 + number, 5, 7], temperature=0.0, max_tokens=max_tokens, ignore_eos=True
        )
        num_tokens = 0
        is_under_way = False
        error = None
        try:
            for delta in self._client.generate(request, timeout_s=_CALL_LIMIT_S):
                num_tokens += len(delta.token_ids)
                if not is_under_way and num_tokens >= _UNDER_WAY:
                    is_under_way = True
                    self._under_way.release()
        except CallFailed as failed:
            error = failed
        except ValueError as closed:  # grpc's answer to a channel closed under a call
            error = CallFailed("CANCELLED", str(closed))
        return StreamEnd(num_tokens, error, time.monotonic())


@contextlib.contextmanager
def running_streams(
    address: str, num_streams: int = NUM_STREAMS, max_tokens: int = ENDLESS
) -> Iterator[RunningStreams]:
    """Streams in flight for the length of the block."""
    streams = RunningStreams(address, num_streams, max_tokens)
    try:
        yield streams
    finally:
        streams.close()


class ChaosGroup(ServedGroup):
    """A group whose processes go by name: "engine", "frontend", "rank 0", "rank 1"."""

    def __init__(self, model: Path, folder: Path, *flags: str) -> None:
        super().__init__(model, folder, *FLAGS, *flags)
        self.num_losses = 0

    def find(self, name: str, limit_s: float = 30.0) -> psutil.Process:
        """That process, as soon as it runs its own program."""
        deadline = time.monotonic() + limit_s
        while (process := self._find(name)) is None:
            assert time.monotonic() < deadline, f"no {name}: {self.log_text()}"
            time.sleep(_POLL_S)
        return process

    def lose(self, name: str, number: signal.Signals) -> float:
        """Sends a signal that ends or stops that process; returns when, on the monotonic clock."""
        process = self.find(name)
        self.num_losses += 1
        process.send_signal(number)
        return time.monotonic()

    def epoch(self) -> int:
        with self.client() as client:
            return client.server_info().epoch

    def readiness(self) -> str:
        """Name of the health status, or of the code that the call ended with."""
        with self.channel() as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError as error:
                return str(error.code().name)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

    def comes_back(self, above_epoch: int, limit_s: float = RECOVERY_LIMIT_S) -> bool:
        """Waits until a later epoch than that is ready (True) or the group has ended (False)."""
        wait_until(
            lambda: (
                self.process.poll() is not None
                or (self.readiness() == "SERVING" and self.epoch() > above_epoch)
            ),
            limit_s,
            lambda: f"the group does not come back: {self.log_text()}",
        )
        return self.process.poll() is None

    def wait_answering(self, above_epoch: int, limit_s: float = RECOVERY_LIMIT_S) -> None:
        """Until a later epoch than that is ready; then a request must be served whole."""
        assert self.comes_back(above_epoch, limit_s), f"the group has ended: {self.log_text()}"
        request = ids_request([3, 4], temperature=0.0, max_tokens=4, ignore_eos=True)
        with self.client() as client:
            answer = client.generate_unary(request, timeout_s=30)
        assert len(answer.output.token_ids) == 4

    def kill_all(self) -> None:
        """Ends a group that a test has failed with."""
        self._kill_all()

    def _find(self, name: str) -> psutil.Process | None:
        """Workers start in order of rank, and a worker that is started again comes last."""
        if name.startswith("rank "):
            ranks = self._ranks_by_pid()
            return ranks.get(int(name.split()[1]))
        module = {"engine": "coordinator", "frontend": "coordinator.frontend"}[name]
        found = self.running(module)
        return found[0] if found else None

    def _ranks_by_pid(self) -> dict[int, psutil.Process]:
        if not self.address:
            return dict(enumerate(sorted(self.running("worker"), key=lambda p: p.pid)))
        with self.client() as client:
            pids = [rank.pid for rank in client.server_info().ranks]
        return {rank: psutil.Process(pid) for rank, pid in enumerate(pids) if pid}

    def running(self, module: str) -> list[psutil.Process]:
        """The processes that run this module."""
        found = []
        for process in self.members():
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if "-m" in words and words[words.index("-m") + 1] == module:
                    found.append(process)
        return found


class GroupPool:
    """Lends groups, and starts one only if none is left that can do what is wanted.

    A group survives two losses. Whoever wants to end it takes one that has no more to give.
    """

    def __init__(self, model: Path, make_folder: Callable[[], Path]) -> None:
        self._model = model
        self._make_folder = make_folder
        self._idle: list[ChaosGroup] = []

    @contextlib.contextmanager
    def starting(self, *flags: str) -> Iterator[ChaosGroup]:
        """A new group that has only just been started."""
        with self._lent(ChaosGroup(self._model, self._make_folder(), *flags)) as group:
            yield group

    @contextlib.contextmanager
    def restartable(self) -> Iterator[ChaosGroup]:
        """A group that answers and survives a loss."""
        fit = [group for group in self._idle if group.num_losses < _MAX_LOSSES]
        with self._lent(self._take(fit)) as group:
            yield group if group.address else group.wait_ready()

    @contextlib.contextmanager
    def to_end(self) -> Iterator[ChaosGroup]:
        """A group that answers, the most used one; the block ends it."""
        by_use = sorted(self._idle, key=lambda group: group.num_losses, reverse=True)
        with self._lent(self._take(by_use)) as group:
            yield group if group.address else group.wait_ready()

    def close(self) -> None:
        """Stops what is left."""
        with contextlib.ExitStack() as stack:
            for group in self._idle:
                stack.callback(group.stop)
        self._idle.clear()

    def _take(self, candidates: Sequence[ChaosGroup]) -> ChaosGroup:
        if not candidates:
            return ChaosGroup(self._model, self._make_folder())
        self._idle.remove(candidates[0])
        return candidates[0]

    @contextlib.contextmanager
    def _lent(self, group: ChaosGroup) -> Iterator[ChaosGroup]:
        try:
            yield group
        except BaseException:
            group.kill_all()
            raise
        if group.process.poll() is None:
            self._idle.append(group)


def wait_until(condition: Callable[[], bool], limit_s: float, why_not: Callable[[], str]) -> None:
    """Polls; fails with `why_not` after `limit_s`. A server that is down counts as not yet."""
    deadline = time.monotonic() + limit_s
    while True:
        with contextlib.suppress(CallFailed):
            if condition():
                return
        assert time.monotonic() < deadline, why_not()
        time.sleep(_POLL_S)
