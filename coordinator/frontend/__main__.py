"""`python -m coordinator.frontend`: started by the engine, never by hand."""

import asyncio
import os
import signal
import socket
import sys

import uvloop

from coordinator.errors import BadCheckpoint
from coordinator.frontend.api_keys import ApiKeysError
from coordinator.frontend.config import FrontendConfig, parse_config
from coordinator.frontend.errors import TracingUnavailable
from coordinator.frontend.frontend import Ending, run_frontend
from coordinator.frontend.gone_clients import ignore_gone_clients
from coordinator.frontend.server import AddressUnavailable
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.flags import FlagError
from lockstep.daemon.logs import configure_logging
from lockstep.daemon.model_digest import ModelDirError
from lockstep.daemon.parent_death import die_with_parent
from lockstep.daemon.tls_files import TlsFileError

_ENGINE_ENDED = 1


def main(argv: list[str]) -> int:
    """Runs a frontend until it is told to stop; returns its exit code."""
    try:
        config = parse_config(argv)
    except FlagError as error:
        return _refuse(error, ExitCode.CONFIG)
    # A terminal's Ctrl-C and a service manager's SIGTERM reach the whole group; only the engine,
    # which drains first, stops us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent(config.engine_pid)
    configure_logging(config.log_format, "frontend")
    ignore_gone_clients()
    try:
        ending = _run(config)
    except (BadCheckpoint, ModelDirError) as error:
        return _refuse(error, ExitCode.CHECKPOINT)
    except (FlagError, TlsFileError, ApiKeysError, TracingUnavailable) as error:
        return _refuse(error, ExitCode.CONFIG)
    except AddressUnavailable as error:
        return _refuse(error, ExitCode.ADDRESS)
    match ending:
        case Ending.DRAINED:
            return ExitCode.CLEAN
        case Ending.ENGINE_ENDED:
            return _ENGINE_ENDED
        case Ending.ENGINE_SILENT:
            # Stopped or wedged: only its end lets supervision start it again. We die with it.
            os.kill(config.engine_pid, signal.SIGKILL)
            return ExitCode.GROUP_LOST


def _run(config: FrontendConfig) -> Ending:
    engine_socket = socket.socket(fileno=config.engine_fd)
    engine_socket.setblocking(False)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run_frontend(config, engine_socket))


def _refuse(error: Exception, code: ExitCode) -> int:
    print(f"lockstep frontend: {error}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
