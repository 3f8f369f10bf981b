"""The worker daemon: `python -m worker`."""

from __future__ import annotations

import os
import sys

from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.flags import FlagError
from lockstep.daemon.logs import configure_logging
from lockstep.daemon.model_digest import ModelDirError, model_digest
from lockstep.daemon.notify import Notifier
from tpcomm.nccl_loader import nccl_environment
from worker.config import worker_config
from worker.daemon import run_daemon, stop
from worker.device import prepare_device
from worker.errors import DeviceError, WorkerError
from worker.models.spec import load_model_spec
from worker.rank import Rank


def main(argv: list[str]) -> int:
    """Runs a worker until it is told to go; returns its exit code."""
    try:
        config = worker_config(argv, os.environ)
        notifier = Notifier(os.environ)
    except FlagError as error:
        return stop(ExitCode.CONFIG, error)
    configure_logging(config.log_format, f"worker[{os.getpid()}]")
    os.environ.update(nccl_environment(os.environ))
    try:
        digest = model_digest(config.model)
        rank = Rank(config, load_model_spec(config.model))
        prepare_device(config)
    except DeviceError as error:
        return stop(ExitCode.DEVICE, error)
    except (ModelDirError, WorkerError) as error:
        return stop(ExitCode.CHECKPOINT, error)
    return run_daemon(config, rank, digest, notifier)


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a device thread may hang in a collective of a dead group, and the interpreter
    # would wait for it. Everything of ours has been closed above.
    os._exit(exit_code)
