"""`lockstep replay`: starts workers for a step log, runs it on them, and stops them.

The work is done by `python -m coordinator.replay`; with --workers that is all there is to start.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lockstep.cores import available_cores
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon_process import daemon_environ
from lockstep.devices import choose_devices, count_gpus
from lockstep.errors import ConfigError, HubError
from lockstep.hub import resolve_model
from lockstep.processes import supervised_processes
from lockstep.serve import ServeConfig, group_spec
from lockstep.supervisor import GroupSpec, Supervisor

_STOP_TIMEOUT_S = 10.0


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 the same tokens, 1 others, 6 a rank was lost."""
    parser = _parser()
    options, passed_on = parser.parse_known_args(list(argv))
    if options.workers is None:
        return _run(argv)
    if options.tp is not None or options.devices is not None:
        parser.error("--workers names workers that run; --tp and --devices would start some")
    command = _replay_command(options, options.workers, passed_on)
    if options.model is not None:
        command += ["--model", options.model]
    os.execve(sys.executable, command, daemon_environ(os.environ))


def _run(argv: Sequence[str]) -> int:
    try:
        group = replay_group(argv)
    except ConfigError as error:
        return _refuse(error, ExitCode.CONFIG)
    except HubError as error:
        return _refuse(error, ExitCode.CHECKPOINT)
    with supervised_processes() as processes:
        return Supervisor(group, processes, _report, lambda record: None).run()


def replay_group(argv: Sequence[str]) -> GroupSpec:
    """The group of `lockstep serve` with the replay in the coordinator's place.

    Raises ConfigError, HubError; exits with 2 on words that do not parse.
    """
    parser = _parser()
    options, passed_on = parser.parse_known_args(list(argv))
    if options.model is None:
        parser.error("--model is missing; workers that are to be started want a checkpoint folder")
    model_dir = resolve_model(options.model)
    num_ranks = options.tp or 1
    wanted = "cpu" if options.simulated else options.devices
    devices = choose_devices(wanted, num_ranks, 0 if wanted == "cpu" else count_gpus(os.environ))
    config = ServeConfig(
        model=options.model,
        devices=devices,
        num_threads=options.num_threads or max(1, available_cores() // num_ranks),
        port=0,
        metrics_host="127.0.0.1",
        metrics_port=0,
        withdrawal_seconds=0.0,
        drain_seconds=0.0,
        nccl_path=None,
        restart=False,
        log_format="text",
        ready_file=None,
        passed_on=(),
    ).with_secret()
    served = group_spec(config, model_dir, os.environ)

    def worker_command(rank: int, port: int, metrics_port: int, ready_file: str) -> Sequence[str]:
        if options.simulated:
            command = _simulated_worker(model_dir, port, metrics_port, ready_file)
            command += config.group_words
        else:
            command = list(served.worker_command(rank, port, metrics_port, ready_file))
        return command + shlex.split(options.worker_flags)

    def replay_command(
        workers: Sequence[str], port: int, metrics_port: int, ready_file: str
    ) -> Sequence[str]:
        # The supervisor ends the workers; one that ended before it would look lost.
        words = ["--leave-workers", *passed_on, "--model", str(model_dir), *config.group_words]
        return _replay_command(options, ",".join(workers), words)

    return replace(
        served,
        worker_command=worker_command,
        coordinator_command=replay_command,
        worker_stop_timeout_s=_STOP_TIMEOUT_S,
    )


def _simulated_worker(model_dir: Path, port: int, metrics_port: int, ready_file: str) -> list[str]:
    return [
        *(sys.executable, "-P", "-m", "worker.simulated", "--model", str(model_dir)),
        *("--port", str(port), "--metrics-port", str(metrics_port)),
        *("--ready-file", ready_file),
    ]


def _replay_command(options: argparse.Namespace, workers: str, words: Sequence[str]) -> list[str]:
    command = [sys.executable, "-P", "-m", "coordinator.replay", str(options.log)]
    command += ["--workers", workers, *words]
    return command + (["--simulated"] if options.simulated else [])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lockstep replay",
        allow_abbrev=False,
        description="Runs a step log (--step-log of serve) again and compares what comes.",
        epilog="Further flags, such as --pace, --epoch, --last-command, --step-timeout and --json, "
        "are those of `python -m coordinator.replay --help`.",
    )
    add = parser.add_argument
    add("log", type=Path, metavar="LOG", help="FILE of --step-log, or one segment FILE.N")
    add("--workers", help="host:port of workers that run, by rank")
    add("--tp", type=int, help="ranks to start; default: 1")
    add("--model", help="checkpoint folder or hub id of the workers to start")
    add("--devices", help="as for lockstep serve")
    add("--num-threads", type=int, help="CPU threads of a rank; default: its share of cores")
    add("--worker-flags", default="", help='more flags for the workers, such as "--step-ms 2"')
    add("--simulated", action="store_true", help="start workers without a model")
    return parser


def _report(line: str) -> None:
    print(f"lockstep replay: {line}", file=sys.stderr, flush=True)


def _refuse(error: Exception, code: ExitCode) -> int:
    _report(str(error))
    return code
