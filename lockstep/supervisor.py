"""Keeps one coordinator, its workers and perhaps a gateway running, and ends them together.

The rules. A worker that ends is started again on the same port. A coordinator that is ended by a
signal, or crashes after it has served, takes the whole group down with it, and all start again. A
coordinator that exits with one of our exit codes has its reasons: everything stops and its exit
code is ours. A worker that refuses to start (exit codes 2 to
5) would refuse again: everything stops with its code. A gateway starts once the coordinator can
answer, outlives restarts of the group, and is started again when it ends or does not get ready; one
that ends before it ever was ready stops everything. Too many losses end with exit code 6.
"""

import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lockstep.daemon.exit_codes import ExitCode
from lockstep.gateway import GatewaySpec
from lockstep.processes import ChildExited, Processes, SignalReceived
from lockstep.ready_record import PendingReady, ReadyRecord

COORDINATOR = "coordinator"
GATEWAY = "gateway"

_REFUSALS = (ExitCode.CONFIG, ExitCode.CHECKPOINT, ExitCode.DEVICE, ExitCode.ADDRESS)
_MAX_LOSSES = 3
_LOSS_WINDOW_S = 600.0
_READY_POLL_S = 0.05
_IDLE_POLL_S = 60.0


@dataclass(frozen=True)
class GroupSpec:
    """What to run. Commands are argument lists; a port of 0 is chosen by the first start.

    worker_command(rank, port, metrics_port, ready_file); the first ports of a rank are 0 and
    `worker_metrics_port(rank)`
    coordinator_command(worker_addresses, port, metrics_port, ready_file); its first ports are
    `coordinator_ports`, (gRPC, metrics).
    """

    num_ranks: int
    worker_command: Callable[[int, int, int, str], Sequence[str]]
    coordinator_command: Callable[[Sequence[str], int, int, str], Sequence[str]]
    coordinator_ports: tuple[int, int]
    environ: Mapping[str, str]
    worker_metrics_port: Callable[[int], int] = lambda rank: 0
    restarts: bool = True
    worker_start_timeout_s: float = 300.0
    drain_timeout_s: float = 45.0
    worker_stop_timeout_s: float = 10.0
    gateway: GatewaySpec | None = None


class _Stop(Exception):
    """First SIGINT, SIGTERM or SIGHUP."""


class _SecondSignal(Exception):
    """Another one while stopping."""


class _GroupEnded(Exception):
    """The group cannot go on; ends the supervisor with `code`."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Supervisor:
    """Runs a group on `processes` until it ends. Main thread only.

    `report` gets one line per thing worth telling; `on_ready` the coordinator's record each time
    the group, and the gateway if there is one, can answer.
    """

    def __init__(
        self,
        group: GroupSpec,
        processes: Processes,
        report: Callable[[str], None],
        on_ready: Callable[[ReadyRecord], None],
    ) -> None:
        self._group = group
        self._processes = processes
        self._report = report
        self._on_ready = on_ready
        self._pending: dict[str, PendingReady] = {}
        self._records: dict[str, ReadyRecord] = {}
        self._losses: deque[float] = deque()
        self._was_ready = False
        # When the gateway must be ready, CLOCK_MONOTONIC; None: it is, or its turn has not come.
        self._gateway_deadline: float | None = None
        self._gateway_was_ready = False

    def run(self) -> int:
        """Returns the exit code; no child is left then."""
        try:
            return self._run_until_coordinator_exits()
        except _Stop:
            return self._stop_in_order()
        except _GroupEnded as ended:
            self._report(str(ended))
            self._processes.stop_all(self._names(), self._group.worker_stop_timeout_s)
            return ended.code
        finally:
            self._processes.kill_all()
            for pending in self._pending.values():
                pending.close()

    def _run_until_coordinator_exits(self) -> int:
        while True:
            self._start_workers()
            self._start_coordinator()
            exited = None
            while exited is None:
                exited = self._pump()
            workers = self._worker_names()
            if not self._is_crash(exited):
                if exited.code != ExitCode.CLEAN:
                    self._report(f"{exited}; stopping the workers")
                self._processes.stop_all([GATEWAY, *workers], self._group.worker_stop_timeout_s)
                return exited.code
            self._report(f"{exited}; restarting it and its workers")
            self._count_loss(str(exited))
            self._processes.stop_all(workers, self._group.worker_stop_timeout_s)

    def _is_crash(self, exited: ChildExited) -> bool:
        """Ended by a signal, or by an unforeseen error in a group that has already worked."""
        return exited.code < 0 or (self._was_ready and exited.code not in set(ExitCode))

    def _start_workers(self) -> None:
        for rank in range(self._group.num_ranks):
            self._start_worker(rank)
        deadline = time.monotonic() + self._group.worker_start_timeout_s
        while waiting := [name for name in self._worker_names() if name in self._pending]:
            self._pump()
            if time.monotonic() > deadline:
                raise _GroupEnded(
                    ExitCode.GROUP_LOST,
                    f"{', '.join(waiting)} did not start within "
                    f"{self._group.worker_start_timeout_s:g} s",
                )

    def _start_worker(self, rank: int) -> None:
        name = f"worker {rank}"
        known = self._records.get(name)
        pending = self._expect_ready(name)
        ports = (
            (known.port, known.metrics_port)
            if known
            else (0, self._group.worker_metrics_port(rank))
        )
        command = self._group.worker_command(rank, *ports, str(pending.path))
        self._processes.start(name, command, self._group.environ)

    def _start_coordinator(self) -> None:
        known = self._records.get(COORDINATOR)
        pending = self._expect_ready(COORDINATOR)
        ports = (known.port, known.metrics_port) if known else self._group.coordinator_ports
        addresses = [self._records[name].grpc for name in self._worker_names()]
        command = self._group.coordinator_command(addresses, *ports, str(pending.path))
        self._processes.start(COORDINATOR, command, self._group.environ)

    def _expect_ready(self, name: str) -> PendingReady:
        if name in self._pending:
            self._pending.pop(name).close()
        self._pending[name] = PendingReady()
        return self._pending[name]

    def _pump(self) -> ChildExited | None:
        """Waits for the next thing and deals with it; returns the coordinator's exit."""
        if self._collect_ready():
            return None
        is_waiting = self._pending or self._gateway_deadline is not None
        event = self._processes.next_event(_READY_POLL_S if is_waiting else _IDLE_POLL_S)
        match event:
            case SignalReceived():
                raise _Stop
            case ChildExited(name=name) if name == COORDINATOR:
                self._collect_ready()  # it may have been ready just before it ended
                return event
            case ChildExited(name=name) if name == GATEWAY:
                self._restart_gateway(event)
            case ChildExited():
                self._restart_worker(event)
            case None:
                self._check_gateway()
        return None

    def _collect_ready(self) -> bool:
        """Takes in ready files; True if there were any."""
        found = False
        for name, pending in list(self._pending.items()):
            record = pending.read()
            if record is None:
                continue
            found = True
            self._pending.pop(name).close()
            self._records[name] = record
            if name == COORDINATOR:
                self._was_ready = True
                self._coordinator_ready(record)
        return found

    def _coordinator_ready(self, record: ReadyRecord) -> None:
        gateway = self._group.gateway
        if gateway is None:
            self._on_ready(record)
            return
        if not self._processes.is_running(GATEWAY):
            self._start_gateway(gateway)
        self._gateway_deadline = time.monotonic() + gateway.start_timeout_s

    def _start_gateway(self, gateway: GatewaySpec) -> None:
        command = gateway.command(self._records[COORDINATOR].grpc)
        self._processes.start(GATEWAY, command, gateway.environ)

    def _check_gateway(self) -> None:
        """Looks whether a gateway that was started can answer, and says so."""
        gateway, deadline = self._group.gateway, self._gateway_deadline
        if gateway is None or deadline is None:
            return
        if gateway.is_ready():
            self._gateway_deadline = None
            self._gateway_was_ready = True
            self._on_ready(self._records[COORDINATOR])
        elif time.monotonic() > deadline:
            self._processes.stop_all([GATEWAY], grace_s=0.0)
            self._start_gateway_again(f"gateway not ready within {gateway.start_timeout_s:g} s")

    def _restart_gateway(self, exited: ChildExited) -> None:
        if not self._gateway_was_ready:
            raise _GroupEnded(ExitCode.CONFIG, f"{exited}: its own lines above say why")
        self._start_gateway_again(str(exited))

    def _start_gateway_again(self, why: str) -> None:
        gateway = self._group.gateway
        assert gateway is not None
        self._report(f"{why}; starting it again")
        self._count_loss(why)
        self._start_gateway(gateway)
        self._gateway_deadline = time.monotonic() + gateway.start_timeout_s

    def _restart_worker(self, exited: ChildExited) -> None:
        self._collect_ready()  # it may have been ready just before it ended
        has_served = exited.name not in self._pending
        if exited.code in _REFUSALS and not (has_served and self._was_ready):
            raise _GroupEnded(exited.code, f"{exited}: its own line above says why")
        if not self._group.restarts:
            raise _GroupEnded(ExitCode.GROUP_LOST, f"rank lost: {exited}")
        if not has_served:
            self._count_loss(str(exited))
        self._report(f"{exited}; starting it again")
        self._start_worker(int(exited.name.split()[1]))

    def _count_loss(self, what: str) -> None:
        now = time.monotonic()
        self._losses.append(now)
        while now - self._losses[0] > _LOSS_WINDOW_S:
            self._losses.popleft()
        if not self._group.restarts or len(self._losses) >= _MAX_LOSSES:
            raise _GroupEnded(
                ExitCode.GROUP_LOST,
                f"{what}; {len(self._losses)} such losses in {_LOSS_WINDOW_S / 60:g} minutes, "
                "giving up",
            )

    def _stop_in_order(self) -> int:
        """Gateway, then coordinator, which let their requests finish; then the workers."""
        gateway = self._group.gateway
        try:
            if gateway is not None:
                self._stop_gently([GATEWAY], gateway.stop_timeout_s)
            code = self._stop_gently([COORDINATOR], self._group.drain_timeout_s)
            self._stop_gently(self._worker_names(), self._group.worker_stop_timeout_s)
        except _SecondSignal:
            self._report("second signal: stopping at once")
            self._processes.kill_all()
            return ExitCode.SECOND_SIGNAL
        return code

    def _stop_gently(self, names: Sequence[str], timeout_s: float) -> int:
        """SIGTERM, then SIGKILL when the time is over. Returns the last exit code.

        Raises _SecondSignal.
        """
        for name in names:
            self._processes.signal(name, signal.SIGTERM)
        code: int = ExitCode.CLEAN
        deadline = time.monotonic() + timeout_s
        while any(self._processes.is_running(name) for name in names):
            match self._processes.next_event(max(0.0, deadline - time.monotonic())):
                case SignalReceived():
                    raise _SecondSignal
                case ChildExited(name=name) as exited if name in names:
                    code = exited.code if exited.code >= 0 else ExitCode.GROUP_LOST
                case None:
                    self._report(f"{', '.join(names)} did not stop within {timeout_s:g} s: killed")
                    self._processes.stop_all(names, grace_s=0.0)
                    return ExitCode.GROUP_LOST
        return code

    def _worker_names(self) -> list[str]:
        return [f"worker {rank}" for rank in range(self._group.num_ranks)]

    def _names(self) -> list[str]:
        return [GATEWAY, COORDINATOR, *self._worker_names()]
