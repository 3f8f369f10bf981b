"""What the service asks of a rank: the real one with its model, or a simulated one.

Nothing here, and nothing in what serves a rank (service, streams, daemon), imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from protos.lockstep.v1 import worker_pb2


class StepTime(NamedTuple):
    """`seconds` on the device, and CLOCK_MONOTONIC when the step had `ended`."""

    seconds: float
    ended: float


class PendingStep(Protocol):
    """A step that has been enqueued."""

    @property
    def command_id(self) -> int: ...
    @property
    def step(self) -> int: ...

    @property
    def arrived(self) -> float:
        """CLOCK_MONOTONIC when its command arrived."""
        ...

    def wait(self) -> StepTime:
        """Blocks until the step has ended on the device. Results thread."""
        ...

    def result(self) -> worker_pb2.StepResult:
        """Its numbers and entries, once it has ended; measurements are the stream's to add."""
        ...


class StepExecutor(Protocol):
    """One epoch's command stream. `execute` is for the device thread, the rest for any."""

    def execute(self, command: worker_pb2.StepCommand, arrived: float) -> Iterator[PendingStep]:
        """Yields each step as soon as it is enqueued.

        Raises CommandRefused, before anything was launched or yielded.
        """
        ...

    @property
    def num_all_reduces(self) -> int:
        """All-reduces that this rank has run in its group; perhaps slightly old."""
        ...

    @property
    def comm_seconds(self) -> float | None:
        """Time in collectives in this epoch, perhaps slightly old; None: not measured."""
        ...


class Rank(Protocol):
    """The state of one rank. Phases run on the device thread; `abort` and `recorded` in any."""

    phase: worker_pb2.WorkerPhase
    rank: int
    world_size: int

    @property
    def executor(self) -> StepExecutor | None:
        """Of the epoch, once it is ready."""
        ...

    @property
    def foreseen_errors(self) -> tuple[type[BaseException], ...]:
        """What a step may raise that its message explains in full, without a traceback."""
        ...

    @property
    def is_joined(self) -> bool:
        """Whether there is something of an epoch to leave."""
        ...

    @property
    def memory_bytes(self) -> Mapping[str, int]:
        """The memory ledger, by kind."""
        ...

    def device_identity(self) -> tuple[str, str]:
        """(name, UUID) of the device; the UUID is empty where it is no GPU."""
        ...

    def enter_thread(self) -> None:
        """Prepares the calling thread for the device."""
        ...

    def load(self, config: worker_pb2.EngineConfig) -> worker_pb2.LoadResponse:
        """Start-up phase 2; the others follow in this order."""
        ...

    def create_group_id(self, host: str) -> bytes:
        """The communicator id that the others will dial; `host` is where they reach this rank."""
        ...

    def join(self, group_id: bytes, timeout_s: float) -> float:
        """Becomes part of the group; returns the seconds it took."""
        ...

    def preflight(self, timeout_s: float) -> worker_pb2.PreflightResponse:
        """Checks every communication path."""
        ...

    def capture(self) -> worker_pb2.CaptureResponse:
        """Captures graphs and says what KV cache fits."""
        ...

    def init_kv_cache(self, num_blocks: int, epoch: int) -> int:
        """Takes the agreed number of blocks; returns their bytes. Commands may come now."""
        ...

    def reset(self) -> None:
        """Leaves the epoch but for what may be kept."""
        ...

    def recorded(self) -> worker_pb2.DumpFlightRecorderResponse:
        """The last collectives and totals of all. Any thread, also while one hangs.

        Blocks for at most about a second, then raises one of `foreseen_errors`.
        """
        ...

    def abort(self) -> None:
        """Frees a device thread that hangs or sleeps; never blocks."""
        ...
