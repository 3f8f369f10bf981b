"""How the group stands, for health, the info calls, the metrics and the log."""

import logging
import time
from collections.abc import Callable, Sequence

from coordinator.batch import Batch
from coordinator.config import CoordinatorConfig
from coordinator.metrics import EngineMetrics
from coordinator.progress_watch import ProgressWatch
from coordinator.startup import Group
from lockstep.daemon.version import __version__
from protos.lockstep.v1 import engine_pb2, generate_pb2

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
        self._set_cause(self._starting("starting"))

    def phase_began(self, phase: str) -> None:
        """A start-up phase begins."""
        self._set_cause(self._starting(f"starting, phase {phase}"))

    def phase_ended(self, phase: str, seconds: float) -> None:
        """A start-up phase took that long."""
        _LOG.info("phase %s took %.2f s", phase, seconds)
        self._metrics.startup_seconds[phase] = seconds

    def ready(self, group: Group, batch: Batch, watch: ProgressWatch) -> None:
        """The group can answer."""
        self._group, self._batch, self._watch = group, batch, watch
        self._last_problem = ""
        self._set_ranks_up(True)
        self._set_cause("")
        _LOG.info(
            "ready: %d rank(s), %d KV blocks of %d, context %d",
            self._config.world_size,
            group.num_blocks,
            self._config.block_size,
            group.max_model_len,
        )

    def lost(self, problem: str) -> None:
        """The group cannot answer any more; said again when the root of it is known."""
        self._group, self._batch, self._watch = None, None, None
        self._set_ranks_up(False)
        if problem != self._cause:
            _LOG.error("not ready: %s", problem)
        self._last_problem = problem
        self._set_cause(problem)

    def message(self) -> engine_pb2.EngineMessage:
        """The state as frontends get it."""
        group, batch = self._group, self._batch
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
            kv_cache_usage=batch.kv_usage if batch else 0.0,
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
                generate_pb2.RankInfo(rank=rank, address=address)
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
