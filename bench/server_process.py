"""A server for the length of a benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.daemons import end_process

_STOP_LIMIT_S = 30.0


class ServerProcess:
    """`lockstep serve`, or another such `subcommand`, as a child: ready on entry, stopped on exit.

    Raises RuntimeError when it ends or is not ready within the limit.
    """

    def __init__(self, flags: list[str], start_limit_s: float, subcommand: str = "serve") -> None:
        self._subcommand = subcommand
        self._flags = flags
        self._start_limit_s = start_limit_s
        self.address = ""
        self.metrics = ""
        self.start_seconds = 0.0

    def __enter__(self) -> Self:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            ready = Path(folder) / "ready.json"
            command = [sys.executable, "-m", "lockstep.cli", self._subcommand, *self._flags]
            command += ["--port", "0", "--metrics-port", "0", "--ready-file", str(ready)]
            self._process = subprocess.Popen(command, stdout=sys.stderr)
            while not ready.exists():
                late = time.monotonic() - started > self._start_limit_s
                if self._process.poll() is not None or late:
                    self._stop()
                    raise RuntimeError(
                        f"lockstep {self._subcommand} is not ready after"
                        f" {time.monotonic() - started:.0f} s"
                        f" (exit code {self._process.returncode})"
                    )
                time.sleep(0.05)
            said = json.loads(ready.read_text(encoding="utf-8"))
            self.address, self.metrics = said["grpc"], said["metrics"]
        self.start_seconds = time.monotonic() - started
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        end_process(self._process, _STOP_LIMIT_S)
