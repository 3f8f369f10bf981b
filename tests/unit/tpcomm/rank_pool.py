"""Rank processes that live for a test session and run one function on every rank at a time."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from tpcomm import Communicator, create_communicator

GROUP_TIMEOUT_S = 30.0


@dataclass
class Rank:
    """What a function that runs on a rank gets: who it is, and communicators made before."""

    rank: int
    world_size: int
    device: torch.device
    communicators: dict[bytes, Communicator] = field(default_factory=dict)

    def join(self, backend: str, group_id: bytes, timeout_s: float) -> Communicator:
        return create_communicator(
            backend, group_id, self.rank, self.world_size, self.device, timeout_s
        )

    def shared(self, backend: str, group_id: bytes) -> Communicator:
        """The communicator of this group, made at the first call and kept."""
        if group_id not in self.communicators:
            self.communicators[group_id] = self.join(backend, group_id, GROUP_TIMEOUT_S)
        return self.communicators[group_id]


class RankPool:
    """`size` processes; `run` uses the first `world_size` of them."""

    def __init__(self, size: int, device_type: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, device_type), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(
        self, world_size: int, function: Callable[..., Any], *args: Any, limit_s: float = 100.0
    ) -> list[Any]:
        """`[function(rank, *args)]` of every rank; AssertionError with the traceback of any."""
        for pipe in self._pipes[:world_size]:
            pipe.send((world_size, function, args))
        deadline = time.monotonic() + limit_s
        replies = []
        for rank, pipe in enumerate(self._pipes[:world_size]):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise AssertionError(f"rank {rank} did not finish {function.__name__}")
            replies.append(pipe.recv())
        errors = [f"rank {r}: {text}" for r, (ok, text) in enumerate(replies) if not ok]
        assert not errors, "\n".join(errors)
        return [value for _, value in replies]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(1)
            if process.is_alive():
                process.kill()
                process.join(5)


def _serve(pipe: Connection, rank: int, device_type: str) -> None:
    torch.set_num_threads(1)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    communicators: dict[bytes, Communicator] = {}
    while True:
        try:
            world_size, function, args = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            value = function(Rank(rank, world_size, device, communicators), *args)
            pipe.send((True, value))
        except BaseException:  # noqa: BLE001  the parent raises it
            pipe.send((False, traceback.format_exc()))
