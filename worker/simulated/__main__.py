"""The simulated worker daemon: `python -m worker.simulated`."""

from __future__ import annotations

import os
import sys

from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.flags import FlagError
from lockstep.daemon.logs import configure_logging
from lockstep.daemon.model_digest import ModelDirError, model_digest
from lockstep.daemon.notify import Notifier
from worker.daemon import run_daemon, stop
from worker.errors import WorkerError
from worker.simulated.config import simulated_config
from worker.simulated.rank import SimulatedRank


def main(argv: list[str]) -> int:
    """Runs a simulated worker until it is told to go; returns its exit code."""
    try:
        config = simulated_config(argv, os.environ)
        notifier = Notifier(os.environ)
    except FlagError as error:
        return stop(ExitCode.CONFIG, error)
    configure_logging(config.log_format, f"simulated[{os.getpid()}]")
    try:
        digest = model_digest(config.model)
        rank = SimulatedRank(config)
    except (ModelDirError, WorkerError) as error:
        return stop(ExitCode.CHECKPOINT, error)
    return run_daemon(config, rank, digest, notifier)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
