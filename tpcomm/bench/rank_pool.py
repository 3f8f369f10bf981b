"""Rank processes that run one function on every rank at a time, each call under a limit."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from tpcomm.factory import create_communicator
from tpcomm.group_id import parse_group_id
from tpcomm.staged import StagedCommunicator

_JOIN_S = 60.0
_EXIT_S = 5.0


class RanksFailed(RuntimeError):
    """A call raised on a rank, or did not end in time; the pool is gone.

    `replies` are those of the ranks that ended well.
    """

    def __init__(self, message: str, replies: Sequence[Any]) -> None:
        super().__init__(message)
        self.replies = tuple(replies)


@dataclass
class RankContext:
    """What a function gets on a rank."""

    rank: int
    world_size: int
    device: torch.device
    group_id: bytes
    staging_bytes: int
    comm: StagedCommunicator | None = None

    def join(self) -> StagedCommunicator:
        """The group's communicator, made by the first call."""
        if self.comm is None:
            comm = create_communicator(
                "nccl",
                self.group_id,
                self.rank,
                self.world_size,
                self.device,
                _JOIN_S,
                self.staging_bytes,
            )
            assert isinstance(comm, StagedCommunicator)
            self.comm = comm
        return self.comm

    @property
    def name(self) -> str:
        """Of the group, unique on this host."""
        return parse_group_id(self.group_id, "nccl").name


class RankPool:
    """One process per device. All are killed when a call fails, and hung kernels with them."""

    def __init__(
        self,
        world_size: int,
        group_id: bytes,
        staging_bytes: int,
        environment: Mapping[str, str],
        device_type: str = "cuda",
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            device = torch.device(device_type, rank)
            arguments = (
                theirs,
                RankContext(rank, world_size, device, group_id, staging_bytes),
                dict(environment),
            )
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, function: Callable[..., Any], *args: Any, limit_s: float) -> list[Any]:
        """`[function(context, *args)]` by rank.

        Raises:
            RanksFailed: a rank raised, died or ran past the limit; all ranks are killed.
        """
        deadline = time.monotonic() + limit_s
        replies: list[tuple[bool, Any]] = []
        errors = []
        for pipe in self._pipes:
            pipe.send((function, args))
        for rank, pipe in enumerate(self._pipes):
            try:
                if pipe.poll(max(0.0, deadline - time.monotonic())):
                    replies.append(pipe.recv())
                else:
                    errors.append(f"rank {rank}: not done within {limit_s:g} s")
            except (EOFError, OSError):
                errors.append(f"rank {rank}: its process died")
        errors += [text for ok, text in replies if not ok]
        if errors:
            self.kill()
            good = [value for ok, value in replies if ok]
            raise RanksFailed("\n".join(errors), good)
        return [value for _, value in replies]

    def kill(self) -> None:
        """End all processes; idempotent."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(_EXIT_S)
        self._pipes, self._processes = [], []


def _serve(pipe: Connection, context: RankContext, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)  # before CUDA and NCCL start, which read it once
    torch.set_num_threads(1)
    if context.device.type == "cuda":
        torch.cuda.set_device(context.device)
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            pipe.send((True, function(context, *args)))
        except BaseException as error:  # noqa: BLE001  told to the parent, which raises it
            traceback.print_exc()  # for who looks on: it names files, and a result names no place
            pipe.send((False, f"rank {context.rank}: {type(error).__name__}: {error}"))
