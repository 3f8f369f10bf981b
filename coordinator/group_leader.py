"""Starts the group, runs it, and starts it again when a rank is lost."""

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from coordinator.admission import ModelLimits
from coordinator.arrival_skew import ArrivalSkew
from coordinator.batch import Batch
from coordinator.batch_limits import BatchLimits
from coordinator.broadcast_time import BroadcastTime
from coordinator.collective_skew import CollectiveSkew
from coordinator.config import CoordinatorConfig
from coordinator.errors import RankLost
from coordinator.failure import (
    FailureBudget,
    end_workers,
    find_root,
    quiesce,
    shut_down_workers,
)
from coordinator.flight_records import collect_records
from coordinator.group_access import GroupAccess
from coordinator.group_status import GroupStatus
from coordinator.metrics import EngineMetrics
from coordinator.model_config import ModelConfig
from coordinator.progress_watch import ProgressWatch
from coordinator.request_book import RequestBook
from coordinator.stall_report import StallReport, last_calls, report_stall
from coordinator.startup import Group, Startup
from coordinator.step_log import StepLog
from coordinator.step_loop import StepLoop
from coordinator.tasks import run_until_first_ends
from coordinator.worker_group import StepStreams, WorkerClient
from lockstep.daemon.process_identity import boot_id
from lockstep.daemon.version import __version__
from protos.lockstep.v1 import worker_pb2

_LOG = logging.getLogger(__name__)
_ORDERLY_GONE_TIMEOUT_S = 1.0


class GroupLeader:
    """Leads one group after another, each under its own epoch. Owned by the event loop.

    `flush` sends the book's outbox to the frontends.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        model: ModelConfig,
        model_digest: str,
        book: RequestBook,
        status: GroupStatus,
        metrics: EngineMetrics,
        flush: Callable[[], None],
        step_log: StepLog | None = None,
    ) -> None:
        self._log = step_log
        self._config = config
        self._model = model
        self._digest = model_digest
        self._book = book
        self._status = status
        self._metrics = metrics
        self._flush = flush
        self._workers: Sequence[WorkerClient] = []
        self._hellos: Sequence[worker_pb2.HelloResponse] = []
        self._step_loop: StepLoop | None = None
        self.is_up = asyncio.Event()

    async def run(self) -> None:
        """Leads groups until cancelled; raises StartRefused when that cannot go on."""
        # Workers may outlive a coordinator and refuse epochs that they have seen. Wall-clock
        # milliseconds rise from one coordinator to the next without asking them.
        epoch = time.time_ns() // 1_000_000
        budget = FailureBudget()
        is_restart = False
        while True:
            # Read anew for every epoch, so that replaced files are taken.
            access = GroupAccess.read(self._config.group_tls, self._config.group_secret)
            self._workers = [
                WorkerClient(rank, address, access, epoch)
                for rank, address in enumerate(self._config.workers)
            ]
            self._hellos = []
            self._status.epoch_began(epoch)
            try:
                await self._lead(epoch, is_restart)
            except RankLost as lost:
                problem = await self._end_epoch(epoch, lost)
                budget.spend(problem)
            await self._close_channels()
            self._metrics.group_restarts += 1
            epoch += 1
            is_restart = True

    def wake(self) -> None:
        """Requests have come or gone."""
        if self._step_loop is None:
            self._flush()
        else:
            self._step_loop.wake()

    async def close(self, tell_workers: bool) -> None:
        """Ends what is left after `run`; with `tell_workers` the workers end too."""
        self._book.close("stopping", "the coordinator stops")
        self._flush()
        if tell_workers:
            await shut_down_workers(self._workers, "the coordinator stops", _ORDERLY_GONE_TIMEOUT_S)
        await self._close_channels()

    async def _lead(self, epoch: int, is_restart: bool) -> None:
        startup = Startup(
            self._workers,
            epoch,
            self._config,
            self._model,
            self._digest,
            self._status,
            is_restart,
        )
        begun = time.monotonic()
        try:
            group = await startup.run()
        finally:
            self._hellos = startup.hellos
        self._status.phase_ended("total", time.monotonic() - begun)
        await self._run_group(group)

    async def _run_group(self, group: Group) -> None:
        config = self._config
        limits = BatchLimits(
            group.num_blocks,
            config.block_size,
            config.max_num_seqs,
            config.max_batch_tokens,
            config.prefix_cache,
        )
        batch = Batch(group.epoch, limits)
        watch = ProgressWatch(config.world_size, config.step_timeout)
        if self._log is not None:
            self._log.begin_epoch(
                group.epoch,
                __version__,
                self._digest,
                group.engine_config,
                config.world_size,
                group.num_blocks,
            )
        boot_ids = [hello.boot_id for hello in group.hellos]
        skew = ArrivalSkew(boot_ids)
        self._metrics.command_arrival_skew = skew.seconds
        collective_skew = CollectiveSkew(config.world_size)
        self._metrics.collective_arrival_skew = collective_skew.seconds
        loop = StepLoop(
            batch,
            self._book,
            watch,
            skew,
            collective_skew,
            BroadcastTime(boot_ids, boot_id(), self._metrics.observe_broadcast),
            self._metrics,
            lambda command: streams.send(command),  # made below, each needs the other
            self._flush,
            config.step_timeout,
            self._log,
        )
        streams = StepStreams(self._workers, loop.take_report)
        self._book.open(
            batch,
            ModelLimits(group.max_model_len, group.vocab_size, group.num_blocks, config.block_size),
        )
        self._step_loop = loop
        # What has been made so far lives as long as the process: keep the collector off it.
        gc.collect()
        gc.freeze()
        self._status.ready(group, batch, watch)
        self.is_up.set()
        try:
            await run_until_first_ends(streams.run(), loop.run(), loop.watch_progress())
        except RankLost as lost:
            step = lost.step or watch.last_step(lost.rank) + 1
            raise RankLost(lost.rank, step, lost.problem) from lost
        finally:
            self._step_loop = None

    async def _end_epoch(self, epoch: int, lost: RankLost) -> str:
        """Does what docs/protocol.md says under "When a rank is lost"; returns what was lost."""
        self._status.lost(str(lost), lost.rank, lost.step)
        stall = await self._examine_collectives(epoch)  # first: an abort frees what waits in them
        answers = await quiesce(self._workers, epoch)
        root = find_root(lost, answers, stall.behind if stall.is_stall else ())
        if stall.is_stall:
            root = replace(root, problem=f"{root.problem}; {stall.line}")
        self._metrics.rank_losses[root.rank] += 1
        self._status.rank_failed(root.rank, root.problem)
        for rank, answer in enumerate(answers):
            if answer is not None and answer.last_error:
                fields = {"rank": rank, "epoch": epoch, "step": answer.last_step}
                _LOG.error(
                    "rank %d, step %d: %s", rank, answer.last_step, answer.last_error, extra=fields
                )
                self._status.rank_failed(rank, answer.last_error)
        self._status.lost(str(root), root.rank, root.step)
        if self._log is not None:
            self._log.end_epoch(str(root))
        self._book.close(f"restarting after: {root}", str(root))
        self._flush()
        is_answering = [answer is not None for answer in answers]
        await end_workers(self._workers, self._hellos, is_answering, str(root))
        return str(root)

    async def _examine_collectives(self, epoch: int) -> StallReport:
        """Reports and keeps what the ranks recorded of their last collectives."""
        records = await collect_records(self._workers)
        report = report_stall(records)
        level = logging.ERROR if report.is_stall else logging.INFO
        for line in (report.line, *report.table):
            _LOG.log(level, "collectives: %s", line, extra={"epoch": epoch})
        if report.is_stall:
            self._status.stalled([report.line, *last_calls(records)])
        return report

    async def _close_channels(self) -> None:
        for worker in self._workers:
            await worker.close()
        self._workers = []
