"""How the group stands, for health, the info calls, the metrics and the log."""

import logging
import os
import time
from collections.abc import Callable, Sequence

from coordinator.batch import Batch
from coordinator.config import CoordinatorConfig
from coordinator.metrics import EngineMetrics
from coordinator.progress_watch import ProgressWatch
from coordinator.startup import Group
from lockstep.daemon.process_identity import boot_id, start_ticks
from lockstep.daemon.version import __version__
from protos.lockstep.v1 import engine_pb2, generate_pb2, worker_pb2

_LOG = logging.getLogger(__name__)


class GroupStatus:
    """The group as outsiders see it. `on_change` is called after every change."""

    def __init__(
        self, config: CoordinatorConfig, metrics: EngineMetrics, on_change: Callable[[], None]
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._on_change = on_change
        self._epoch = 0
        self._cause = "starting"
        self._last_problem = ""
        self._last_loss = ""
        self._last_stall = ""
        self._rank_errors: dict[int, str] = {}
        self._identity = (os.getpid(), start_ticks(os.getpid()), boot_id())
        self._group: Group | None = None
        self._batch: Batch | None = None
        self._watch: ProgressWatch | None = None
        self._set_ranks_up(False)

    @property
    def is_ready(self) -> bool:
        return self._group is not None

    @property
    def summary(self) -> str:
        """One line for people: the load, or why the group cannot answer."""
        if self._batch is None:
            return self._cause
        num_waiting = len(self._batch.queue)
        return (
            f"serving {self._config.served_model_name} on {self._config.world_size} rank(s), "
            f"{self._batch.num_running} running, {num_waiting} waiting"
        )

    def stalled_s(self) -> float:
        """Seconds for which a rank has owed a report; 0 if none does or the group is starting."""
        return self._watch.longest_wait_s(time.monotonic()) if self._watch else 0.0

    def epoch_began(self, epoch: int) -> None:
        """A start of the group begins."""
        self._epoch = epoch
        self._metrics.epoch = epoch
        self._set_cause(self._starting("starting"))

    def phase_began(self, phase: str) -> None:
        """A start-up phase begins."""
        self._set_cause(self._starting(f"starting, phase {phase}"))

    def phase_ended(self, phase: str, seconds: float) -> None:
        """A start-up phase took that long."""
        _LOG.info("phase %s took %.2f s", phase, seconds, extra={"epoch": self._epoch})
        self._metrics.startup_seconds[phase] = seconds

    def ready(self, group: Group, batch: Batch, watch: ProgressWatch) -> None:
        """The group can answer."""
        self._group, self._batch, self._watch = group, batch, watch
        self._last_problem = ""
        self._metrics.kv_cache_blocks = group.num_blocks
        self._metrics.block_size = self._config.block_size
        self._set_ranks_up(True)
        self._set_cause("")
        _LOG.info(
            "ready: %d rank(s), %d KV blocks of %d, context %d",
            self._config.world_size,
            group.num_blocks,
            self._config.block_size,
            group.max_model_len,
            extra={"epoch": self._epoch},
        )

    def lost(self, problem: str, rank: int, step: int) -> None:
        """The group cannot answer any more; said again when the root of it is known.

        `rank` and `step` are where it failed, for the log.
        """
        self._group, self._batch, self._watch = None, None, None
        self._set_ranks_up(False)
        if problem != self._cause:
            fields = {"rank": rank, "epoch": self._epoch, "step": step}
            _LOG.error("not ready: %s", problem, extra=fields)
        self._last_problem = self._last_loss = problem
        self._set_cause(problem)

    def stalled(self, lines: Sequence[str]) -> None:
        """What the ranks' records said of a stall; kept until the next one."""
        self._last_stall = "\n".join(lines)

    def rank_failed(self, rank: int, error: str) -> None:
        """What a rank said last, or what was seen of it; kept until it says something else."""
        self._rank_errors[rank] = error

    def message(self) -> engine_pb2.EngineMessage:
        """The state as frontends get it."""
        group, batch = self._group, self._batch
        pid, pid_start_ticks, host_boot_id = self._identity
        server = generate_pb2.GetServerInfoResponse(
            version=__version__,
            is_ready=self.is_ready,
            epoch=self._epoch,
            ranks=self._ranks(),
            running_count=batch.num_running if batch else 0,
            waiting_count=batch.num_waiting if batch else 0,
            block_count=group.num_blocks if group else 0,
            block_size=self._config.block_size,
            max_num_seqs=self._config.max_num_seqs,
            comm_paths=_comm_paths(group.preflight) if group else [],
            kv_cache_usage=batch.kv_usage if batch else 0.0,
            cause=self._cause,
            last_loss=self._last_loss,
            last_stall=self._last_stall,
            pid=pid,
            pid_start_ticks=pid_start_ticks,
            boot_id=host_boot_id,
        )
        state = engine_pb2.GroupState(
            is_ready=self.is_ready,
            cause=self._cause,
            server=server,
            max_model_len=group.max_model_len if group else 0,
            vocab_size=group.vocab_size if group else 0,
        )
        return engine_pb2.EngineMessage(state=state)

    def _ranks(self) -> Sequence[generate_pb2.RankInfo]:
        group, watch = self._group, self._watch
        if group is None or watch is None:
            return [
                generate_pb2.RankInfo(
                    rank=rank, address=address, last_error=self._rank_errors.get(rank, "")
                )
                for rank, address in enumerate(self._config.workers)
            ]
        return [
            generate_pb2.RankInfo(
                rank=rank,
                address=address,
                pid=group.hellos[rank].pid,
                device=group.hellos[rank].device,
                is_up=True,
                local_q_head_count=group.loads[rank].local_q_head_count,
                local_kv_head_count=group.loads[rank].local_kv_head_count,
                parameter_count=group.loads[rank].parameter_count,
                bytes_read=group.loads[rank].bytes_read,
                all_reduce_count=watch.num_all_reduces[rank],
                version=group.hellos[rank].version,
                host=group.hellos[rank].host,
                memory_bytes=group.memory_bytes[rank],
                last_error=self._rank_errors.get(rank, ""),
            )
            for rank, address in enumerate(self._config.workers)
        ]

    def _starting(self, words: str) -> str:
        """With what made a start necessary, which is what a refused client wants to know."""
        return f"{words}, after: {self._last_problem}" if self._last_problem else words

    def _set_ranks_up(self, is_up: bool) -> None:
        for rank in range(self._config.world_size):
            self._metrics.rank_up[rank] = is_up

    def _set_cause(self, cause: str) -> None:
        self._cause = cause
        self._on_change()


def _comm_paths(preflight: worker_pb2.PreflightResponse) -> Sequence[generate_pb2.CommPath]:
    serves = {(route.operation, route.path): route.max_byte_count for route in preflight.routes}
    return [
        generate_pb2.CommPath(
            operation=path.operation,
            path=path.path,
            is_usable=path.is_usable,
            detail=path.detail,
            serves_up_to_byte_count=serves.get((path.operation, path.path), 0),
            times=[
                generate_pb2.CommTime(byte_count=time.byte_count, microseconds=time.microseconds)
                for time in path.times
            ],
        )
        for path in preflight.paths
    ]
