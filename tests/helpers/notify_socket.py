"""A service manager's end of NOTIFY_SOCKET."""

from __future__ import annotations

import secrets
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Self


class NotifySocket:
    """Collects what is sent to it. `name` is the value of NOTIFY_SOCKET.

    Under `folder`, or with an abstract name if there is none.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._path = folder / "notify" if folder is not None else None
        self.name = str(self._path) if self._path else f"@lockstep-test-{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + self.name[1:] if self.name.startswith("@") else self.name)
        self.messages: list[str] = []

    def read(self) -> list[str]:
        """What has come since the last read, without waiting; it is in `messages` too."""
        found = []
        self._socket.setblocking(False)
        while True:
            try:
                found.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                self.messages += found
                return found

    def wait_for(self, beginning: str, limit_s: float) -> str:
        """The next message that begins so; AssertionError with all messages if none comes."""
        deadline = time.monotonic() + limit_s
        while (remaining := deadline - time.monotonic()) > 0:
            self._socket.settimeout(remaining)
            try:
                message = self._socket.recv(4096).decode()
            except TimeoutError:
                break
            self.messages.append(message)
            if message.startswith(beginning):
                return message
        raise AssertionError(f"no {beginning} within {limit_s:g} s, but {self.messages}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()
