"""`lockstep drain`: stops a server of this host once the requests that it has accepted have ended.

The coordinator gets SIGTERM, as from a service manager: it is NOT_SERVING at once, refuses new
requests after --withdrawal-seconds and ends those in flight within --drain-seconds. Its supervisor
then stops the workers. Whoever may not signal that process may not drain it: it is no call of the
API.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lockstep.client import CallFailed, Client, ConfigError, ServerInfo
from lockstep.connection_flags import add_reach_flags, reach_config
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.process_identity import boot_id, start_ticks
from lockstep.errors import LockstepError

_POLL_S = 0.2


class DrainRefused(LockstepError):
    """The server cannot be drained from here."""


def main(argv: Sequence[str]) -> int:
    """Returns 0 when the server has ended, 1 when it could not be told to or has not in time."""
    parser = argparse.ArgumentParser(
        prog="lockstep drain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_reach_flags(parser)
    text = "seconds to wait for its end (default: 600)"
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help=text)
    options = parser.parse_args(list(argv))
    try:
        with Client(options.address, reach_config(options, os.environ)) as client:
            server = client.server_info()
            tell(server)
            return _wait(client, server, options.timeout)
    except ConfigError as error:
        _say(str(error))
        return ExitCode.CONFIG
    except (CallFailed, DrainRefused) as error:
        _say(str(error))
        return 1


def tell(server: ServerInfo) -> None:
    """Sends SIGTERM to the coordinator that said this of itself. Raises DrainRefused."""
    if server.boot_id != boot_id() or start_ticks(server.pid) != server.pid_start_ticks:
        raise DrainRefused(
            f"its coordinator, process {server.pid}, is none of this host or container: run this "
            "there, or stop it by what started it (systemctl, kubectl)"
        )
    try:
        os.kill(server.pid, signal.SIGTERM)
    except PermissionError:
        raise DrainRefused(
            f"process {server.pid} belongs to somebody else: run this as that user or as root"
        ) from None
    _say(f"told process {server.pid}, {_in_flight(server)}")


def _wait(client: Client, server: ServerInfo, limit_s: float) -> int:
    deadline = time.monotonic() + limit_s
    said = _in_flight(server)
    while is_running(server.pid, server.pid_start_ticks):
        if time.monotonic() > deadline:
            _say(f"process {server.pid} has not ended within {limit_s:g} s")
            return 1
        try:
            now = _in_flight(client.server_info())
        except CallFailed:
            now = said  # its port is closed: only the last steps of its end are left
        if now != said:
            said = now
            _say(said)
        time.sleep(_POLL_S)
    _say("it has ended")
    return 0


def is_running(pid: int, ticks: int) -> bool:
    """Whether that process, and no later one of the same id, still runs; a zombie does not."""
    if start_ticks(pid) != ticks:
        return False
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def _in_flight(server: ServerInfo) -> str:
    return f"{server.running_count} requests running, {server.waiting_count} waiting"


def _say(line: str) -> None:
    print(f"lockstep drain: {line}", file=sys.stderr, flush=True)
