"""`python -m coordinator.replay LOG --workers host:port,...`: runs a step log on ranks again.

The group comes up with the recorded configuration and block count, under an epoch of its own. Exit
codes: 0 the same tokens, 1 other tokens, 6 a rank was lost or hangs, others as the daemons'.
"""

import argparse
import asyncio
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from coordinator.config import CoordinatorConfig, worker_addresses
from coordinator.errors import BadStepLog, RankLost, StartRefused
from coordinator.failure import end_workers, find_root, quiesce, shut_down_workers
from coordinator.group_access import GroupAccess
from coordinator.model_config import ModelConfig
from coordinator.progress_watch import ProgressWatch
from coordinator.replay_comparison import Comparison
from coordinator.replay_report import LostRank, ReplayReport
from coordinator.replay_run import ReplayRun
from coordinator.startup import Group, RecordedGroup, Startup
from coordinator.step_command import CommandEncoder
from coordinator.step_log_reader import RecordedRun, open_log
from coordinator.tasks import run_until_first_ends
from coordinator.worker_group import StepStreams, WorkerClient
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.flags import FlagError
from lockstep.daemon.logs import configure_logging
from lockstep.daemon.model_digest import ModelDirError, model_digest
from lockstep.daemon.security_flags import GROUP_FLAGS, group_tls
from protos.lockstep.v1 import worker_pb2

_LOG = logging.getLogger(__name__)
_GONE_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class ReplayOptions:
    """What to replay, on whom and how. Times in seconds."""

    log: Path
    workers: tuple[str, ...]
    model: Path | None
    pace: str
    epoch: int | None
    last_command: int | None
    step_timeout: float
    startup_timeout: float
    is_simulated: bool
    end_workers: bool
    as_json: bool
    group_cert: str = ""
    group_key: str = ""
    group_ca: str = ""
    group_secret: str = ""


def main(argv: Sequence[str]) -> int:
    """Replays a log, prints what it found; returns the exit code."""
    options = _options(argv)
    configure_logging("text", "replay")
    try:
        log = open_log(options.log, options.epoch, options.last_command)
        check_fit(options, log)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            report = runner.run(replay(options, log))
    except (BadStepLog, FlagError) as error:
        return _stop(ExitCode.CONFIG, error)
    except ModelDirError as error:
        return _stop(ExitCode.CHECKPOINT, error)
    except StartRefused as error:
        return _stop(error.exit_code, error)
    except KeyboardInterrupt:
        return _stop(ExitCode.SECOND_SIGNAL, "interrupted")
    print(report.text())
    if options.as_json:
        print(json.dumps(report.as_json()))
    return report.exit_code


def check_fit(options: ReplayOptions, log: RecordedRun) -> None:
    """The log and what it is to run on belong together; raises StartRefused naming both sides."""
    if len(options.workers) != log.header.world_size:
        raise StartRefused(
            ExitCode.CONFIG,
            f"the log was recorded with {log.header.world_size} ranks, --workers names "
            f"{len(options.workers)}",
        )
    if options.model is None:
        return
    digest = model_digest(options.model)
    if digest != log.header.model_digest:
        raise StartRefused(
            ExitCode.CHECKPOINT,
            f"the log was recorded with the checkpoint of digest {log.header.model_digest[:16]}, "
            f"--model {options.model} has {digest[:16]}",
        )


async def replay(options: ReplayOptions, log: RecordedRun) -> ReplayReport:
    """Brings the group up, replays, and lets it go. Raises FlagError, StartRefused, BadStepLog."""
    epoch = time.time_ns() // 1_000_000  # as GroupLeader chooses it
    files = group_tls(options.group_cert, options.group_key, options.group_ca)
    access = GroupAccess.read(files, options.group_secret)
    workers = [
        WorkerClient(rank, address, access, epoch) for rank, address in enumerate(options.workers)
    ]
    one = _OneReplay(options, log, workers, epoch)
    try:
        lost = await one.run()
        return ReplayReport(log, one.comparison, lost)
    finally:
        for worker in workers:
            await worker.close()


class _OneReplay:
    def __init__(
        self, options: ReplayOptions, log: RecordedRun, workers: Sequence[WorkerClient], epoch: int
    ) -> None:
        self._options = options
        self._log = log
        self._workers = workers
        self._epoch = epoch
        self._startup = _startup(options, log, workers, epoch)
        self._watch = ProgressWatch(len(workers), options.step_timeout)
        self._run: ReplayRun | None = None

    @property
    def comparison(self) -> Comparison:
        return self._run.comparison if self._run is not None else Comparison()

    async def run(self) -> LostRank | None:
        try:
            group = await self._startup.run()
            _note_surroundings(self._log, group)
            await self._replay_steps()
        except RankLost as lost:
            return await self._end_lost(lost)
        if self._options.end_workers:
            await shut_down_workers(self._workers, "the replay is over", _GONE_TIMEOUT_S)
        return None

    async def _replay_steps(self) -> None:
        run = ReplayRun(
            self._log.snapshot,
            CommandEncoder(self._epoch),
            self._watch,
            lambda command: streams.send(command),  # made below, each needs the other
            self._options.pace == "recorded",
        )
        self._run = run
        streams = StepStreams(self._workers, run.take_report)
        max_batch_tokens = self._log.header.config.max_batch_tokens
        await run_until_first_ends(
            streams.run(), run.run(self._log.records(), max_batch_tokens), run.watch_progress()
        )

    async def _end_lost(self, lost: RankLost) -> LostRank:
        """Finds where it stopped, and on which rank, as the engine does."""
        answers = await quiesce(self._workers, self._epoch)
        root = find_root(lost, answers)
        answer = answers[root.rank]
        if self._options.end_workers:
            is_answering = [answer is not None for answer in answers]
            await end_workers(self._workers, self._startup.hellos, is_answering, str(root))
        if self._run is None:
            return LostRank(root.rank, 0, 0, root.problem)
        # A rank that is silent has not got further than rank 0, which waits for it in every step.
        last_step = self._run.last_reported
        if answer is not None:
            last_step = max(answer.last_step, self._watch.last_step(root.rank))
        command_id, step = self._run.logged(last_step + 1)
        return LostRank(root.rank, command_id, step, root.problem)


class _LogPhases:
    """A PhaseObserver."""

    def phase_began(self, phase: str) -> None:
        """Says nothing: phases that take long are named by Startup."""

    def phase_ended(self, phase: str, seconds: float) -> None:
        _LOG.info("phase %s took %.2f s", phase, seconds)


def _startup(
    options: ReplayOptions, log: RecordedRun, workers: Sequence[WorkerClient], epoch: int
) -> Startup:
    recorded = worker_pb2.EngineConfig()
    recorded.CopyFrom(log.header.config)
    if options.is_simulated:
        recorded.comm = "auto"  # no tensors to carry, whatever carried them in the record
    config = CoordinatorConfig(
        model=options.model or Path(),
        served_model_name="replay",
        workers=options.workers,
        block_size=recorded.block_size,
        max_num_seqs=recorded.max_num_seqs,
        max_batch_tokens=recorded.max_batch_tokens,
        startup_timeout=options.startup_timeout,
    )
    return Startup(
        workers,
        epoch,
        config,
        ModelConfig(recorded.dtype, recorded.max_model_len),
        log.header.model_digest,
        _LogPhases(),
        recorded=RecordedGroup(recorded, log.header.block_count),
    )


def _note_surroundings(log: RecordedRun, group: Group) -> None:
    devices = ", ".join(hello.device for hello in group.hellos)
    _LOG.info(
        "replaying commands %d to %d on %s", log.snapshot.command_id + 1, log.last_command, devices
    )


def _options(argv: Sequence[str]) -> ReplayOptions:
    parser = argparse.ArgumentParser(
        prog="python -m coordinator.replay", allow_abbrev=False, description=__doc__
    )
    add = parser.add_argument
    add("log", type=Path, metavar="LOG", help="FILE of --step-log, or one segment FILE.N")
    add("--workers", type=worker_addresses, required=True, help="host:port of each, by rank")
    add("--model", type=Path, help="checkpoint folder, to compare with the log's before it starts")
    add("--pace", choices=("max", "recorded"), default="max", help="default: max")
    add("--epoch", type=int, help="which epoch of the log; default: the newest")
    add("--last-command", type=int, metavar="N", help="stop after this command of the log")
    add("--step-timeout", type=float, default=30.0, metavar="SECONDS")
    add("--startup-timeout", type=float, default=600.0, metavar="SECONDS")
    add("--simulated", dest="is_simulated", action="store_true", help="the workers have no model")
    add("--leave-workers", dest="end_workers", action="store_false", help="do not end them after")
    add("--json", dest="as_json", action="store_true", help="one line of JSON last")
    for flag in GROUP_FLAGS:
        add(f"--{flag.name}", default="", metavar="FILE", help=flag.help)
    return ReplayOptions(**vars(parser.parse_args(list(argv))))


def _stop(code: ExitCode, reason: object) -> int:
    print(f"replay: {reason}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
