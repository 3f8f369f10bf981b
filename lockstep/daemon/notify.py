"""What a daemon tells the service manager that started it: sd_notify(3) without libsystemd.

One datagram a message to the Unix socket named by NOTIFY_SOCKET. Nobody listens where the variable
is missing, and then nothing is sent. Whoever counts on a message that could not be sent notices its
absence: the unit does not become ready, or its watchdog bites.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping

from lockstep.daemon.flags import FlagError

_LOG = logging.getLogger(__name__)
_PERIOD_S = 1.0
# Of the watchdog's interval: how long work may stand still until it is fed no more.
_WATCHDOG_SHARE = 0.25


class Notifier:
    """The line to the service manager. For one thread; `close` it or use it in a `with` block."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID; raises FlagError if they are bad."""
        self._address = _socket_address(environ.get("NOTIFY_SOCKET", ""))
        self.watchdog_s = _watchdog_seconds(environ) if self._address else 0.0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if self._address else None
        self._status = ""

    def ready(self) -> None:
        """The daemon serves: units that wait for it may start."""
        self._send("READY=1")

    def stopping(self) -> None:
        """The daemon has begun to stop."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`; sent when it differs from the last one."""
        line = " ".join(text.split())
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    async def run(self, status: Callable[[], str], stalled_s: Callable[[], float]) -> None:
        """Keeps the status line up to date and feeds the watchdog while work progresses.

        `stalled_s` says for how many seconds work that is owed has stood still, 0 if none is. Past
        a quarter of the watchdog's interval it is not fed. Runs until cancelled: on the event loop
        that does the work, so that a loop that hangs starves the watchdog too.
        """
        limit_s = self.watchdog_s * _WATCHDOG_SHARE
        while True:
            self.status(status())
            if limit_s and stalled_s() <= limit_s:
                self._send("WATCHDOG=1")
            await asyncio.sleep(min(_PERIOD_S, limit_s or _PERIOD_S))

    def close(self) -> None:
        """Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> "Notifier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, message: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(message.encode(), socket.MSG_DONTWAIT, self._address)
        except OSError as error:
            _LOG.warning("NOTIFY_SOCKET: %s was not sent: %s", message.partition("=")[0], error)


def _socket_address(name: str) -> str:
    """The address for `sendto`; "@" stands for the zero byte that begins an abstract name."""
    if name and name[0] not in "/@":
        raise FlagError(f"NOTIFY_SOCKET is {name!r}; it must be an absolute path or @name")
    return "\0" + name[1:] if name.startswith("@") else name


def _watchdog_seconds(environ: Mapping[str, str]) -> float:
    """The interval in which this process must be heard of; 0: nobody waits."""
    text = environ.get("WATCHDOG_USEC", "")
    if not text or environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    if not text.isdigit() or int(text) == 0:
        raise FlagError(f"WATCHDOG_USEC is {text!r}; it must be microseconds above 0")
    return int(text) / 1e6
