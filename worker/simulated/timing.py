"""Device time of a simulated step, and sleeping through it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np

from worker.errors import WorkerError
from worker.simulated.tokens import mix


class SimulationAborted(WorkerError):
    """The group was abandoned in the middle of a step."""


@dataclass(frozen=True)
class StepCost:
    """What a step costs; `jitter` is the share by which it varies, equally on all ranks."""

    step_s: float
    row_s: float
    prefill_s: float
    jitter: float
    seed: int

    def seconds(self, step: int, num_rows: int, num_prefill_tokens: int) -> float:
        """Time of the step with this number."""
        cost = self.step_s + num_rows * self.row_s + num_prefill_tokens * self.prefill_s
        if not self.jitter:
            return cost
        word = int(mix(np.array([((self.seed << 32) ^ step) & (2**64 - 1)], np.uint64))[0])
        return cost * (1.0 + self.jitter * (2.0 * word / 2**64 - 1.0))


class SimulatedDevice:
    """Steps in order, each for its time, until absolute deadlines: lateness does not add up.

    `run` is for one thread; `abort` for any.
    """

    def __init__(self) -> None:
        self._free_at = 0.0
        self._aborted = threading.Event()

    def run(self, arrived: float, seconds: float) -> float:
        """Sleeps until the end of a step whose command arrived then; returns that CLOCK_MONOTONIC.

        A step starts when the one before it has ended or its command has arrived, whichever is
        later. Raises SimulationAborted.
        """
        self._free_at = max(self._free_at, arrived) + seconds
        if self._aborted.wait(max(0.0, self._free_at - time.monotonic())):
            raise SimulationAborted("the step was aborted")
        return self._free_at

    def abort(self) -> None:
        """Wakes a sleeping step; no other one will run."""
        self._aborted.set()
