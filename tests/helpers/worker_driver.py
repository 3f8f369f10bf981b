"""Drives worker processes by hand: the protocol of docs/protocol.md without a coordinator."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from coordinator.worker_group import one_by_one
from lockstep.daemon.model_digest import model_digest
from lockstep.daemon.version import __version__
from protos.lockstep.v1 import worker_pb2, worker_pb2_grpc

CALL_LIMIT_S = 60.0


def packed(*numbers: int) -> bytes:
    """Little-endian int32."""
    return np.asarray(numbers, "<i4").tobytes()


class WorkerProcess:
    """`python -m worker` on a free port; killed on exit."""

    def __init__(self, model: Path, folder: Path, *flags: str) -> None:
        self._ready = folder / f"worker-{os.urandom(4).hex()}.json"
        command = [sys.executable, "-m", "worker", "--model", str(model), "--port", "0"]
        command += ["--metrics-port", "0", "--num-threads", "1", "--ready-file", str(self._ready)]
        self.process = subprocess.Popen([*command, *flags])

    def address(self) -> str:
        """host:port, once the worker serves."""
        deadline = time.monotonic() + CALL_LIMIT_S
        while not self._ready.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"worker did not start (exit code {self.process.returncode})")
            time.sleep(0.02)
        return str(json.loads(self._ready.read_text())["grpc"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait(timeout=10)


@dataclass
class StepStream:
    """One Execute stream to one worker, with the running digest and numbers of an epoch."""

    stub: Any
    epoch: int
    command_id: int = 0
    next_step: int = 1
    digest: bytes = bytes(8)
    _outbox: queue.Queue[worker_pb2.ExecuteRequest | None] = field(default_factory=queue.Queue)
    _reports: Any = None
    _unread: deque[worker_pb2.ExecuteResponse] = field(default_factory=deque)

    def __post_init__(self) -> None:
        def requests() -> Iterator[worker_pb2.ExecuteRequest]:
            while (request := self._outbox.get(timeout=CALL_LIMIT_S)) is not None:
                yield request

        self._reports = self.stub.Execute(requests(), timeout=CALL_LIMIT_S)

    def send(self, delta: worker_pb2.TableDelta, step_count: int = 1, **overrides: Any) -> None:
        """Sends the next command; `overrides` replace fields to plant a fault."""
        serialised = delta.SerializeToString()
        self.digest = hashlib.blake2b(self.digest + serialised, digest_size=32).digest()[:8]
        self.command_id += 1
        command = worker_pb2.StepCommand(
            command_id=self.command_id,
            epoch=self.epoch,
            first_step=self.next_step,
            step_count=step_count,
            delta=serialised,
            digest=self.digest,
        )
        self.next_step += step_count
        for name, value in overrides.items():
            setattr(command, name, value)
        self._outbox.put(worker_pb2.ExecuteRequest(command=command))

    def report(self) -> worker_pb2.ExecuteResponse:
        """The next report."""
        if not self._unread:
            self._unread += one_by_one(next(self._reports))
        return self._unread.popleft()

    def tokens(self) -> list[int]:
        """Token ids of the next report, which must be a result."""
        report = self.report()
        assert report.WhichOneof("report") == "result", report
        return [int(token) for token in np.frombuffer(report.result.token_ids, "<i4")]

    def close(self) -> None:
        self._outbox.put(None)
        self._reports.cancel()


def start_group(
    model: Path, addresses: Sequence[str], config: worker_pb2.EngineConfig, epoch: int, blocks: int
) -> list[Any]:
    """Takes workers through all phases; returns their stubs in rank order."""
    stubs = [worker_pb2_grpc.WorkerServiceStub(grpc.insecure_channel(a)) for a in addresses]

    def on_all(name: str, *requests: Any) -> list[Any]:
        calls = [
            getattr(stub, name).future(requests[rank % len(requests)], timeout=CALL_LIMIT_S)
            for rank, stub in enumerate(stubs)
        ]
        return [call.result() for call in calls]

    hellos = [
        worker_pb2.HelloRequest(
            version=__version__,
            model_digest=model_digest(model),
            epoch=epoch,
            rank=rank,
            world_size=len(stubs),
        )
        for rank in range(len(stubs))
    ]
    on_all("Hello", *hellos)
    on_all("Load", worker_pb2.LoadRequest(epoch=epoch, config=config))
    made = stubs[0].CreateGroupId(
        worker_pb2.CreateGroupIdRequest(epoch=epoch), timeout=CALL_LIMIT_S
    )
    on_all(
        "Join",
        worker_pb2.JoinRequest(
            epoch=epoch, group=1, group_id=made.group_id, timeout_seconds=CALL_LIMIT_S
        ),
    )
    on_all("Preflight", worker_pb2.PreflightRequest(epoch=epoch, timeout_seconds=10))
    on_all("Capture", worker_pb2.CaptureRequest(epoch=epoch))
    on_all("InitKvCache", worker_pb2.InitKvCacheRequest(epoch=epoch, block_count=blocks))
    return stubs
