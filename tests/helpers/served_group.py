"""`lockstep serve` or `simulate` as a child process, and proof that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import psutil
from prometheus_client.parser import text_string_to_metric_families

from protos.lockstep.v1 import generate_pb2_grpc
from tests.helpers.message_client import Client

START_LIMIT_S = 100.0
STOP_LIMIT_S = 30.0
_SHARED_MEMORY = Path("/dev/shm")
_POLL_S = 0.02


def serve_environ(folder: Path, **changes: str | None) -> dict[str, str]:
    """This environment with `folder` for temporary files; None removes a variable."""
    environ = {name: value for name, value in os.environ.items() if "LOCKSTEP_" not in name}
    environ |= {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    for name, value in changes.items():
        environ.pop(name, None)
        if value is not None:
            environ[name] = value
    return environ


class ServedGroup:
    """Starts on construction; `wait_ready`, then `stop`. As a context manager it does both.

    `folder` takes log, ready file and temporary files; it must be the group's own. Errors of the
    daemons are in `log_text()`.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        *flags: str,
        environ: Mapping[str, str] | None = None,
        subcommand: str = "serve",
    ) -> None:
        self._shared_before = {path.name for path in _SHARED_MEMORY.iterdir()}
        self._tmp = folder / "tmp"
        self._tmp.mkdir(parents=True)
        self._ready = folder / "ready.json"
        self._log = folder / "serve.log"
        self._members: set[psutil.Process] = set()
        self.address = ""
        self.metrics = ""
        self.http = ""
        command = [sys.executable, "-P", "-m", "lockstep.cli", subcommand]
        command += ["--model", str(model)]
        command += ["--devices", "cpu"] if subcommand == "serve" else []
        command += ["--port", "0", "--metrics-port", "0"]
        command += ["--ready-file", str(self._ready), *flags]
        base = dict(environ) if environ is not None else serve_environ(self._tmp)
        root = str(Path(__file__).resolve().parents[2])
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**base, "TMPDIR": str(self._tmp), "PYTHONPATH": root},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_ready(self, limit_s: float = START_LIMIT_S) -> Self:
        """Returns when requests can be answered; AssertionError with the log otherwise."""
        deadline = time.monotonic() + limit_s
        while not self._ready.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self._kill_all()
                raise AssertionError(f"serve ended or is not ready: {self.log_text()}")
            self.members()
            time.sleep(_POLL_S)
        record = json.loads(self._ready.read_text(encoding="utf-8"))
        assert record["role"] == "serve" and record["pid"] == self.process.pid
        self.address, self.metrics = record["grpc"], record["metrics"]
        self.http = record.get("http", "")
        return self

    def wait_exit(self, limit_s: float = START_LIMIT_S) -> int:
        """The exit code of a group that ends by itself; everything it started is gone too."""
        deadline = time.monotonic() + limit_s
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                self._kill_all()
                raise AssertionError(f"serve did not end: {self.log_text()}")
            self.members()
            time.sleep(_POLL_S)
        self._assert_nothing_left()
        return self.process.returncode

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal, returns the exit code, asserts that nothing is left. Idempotent."""
        self.members()
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._kill_all()
                raise AssertionError(f"serve did not stop: {self.log_text()}") from None
        self._assert_nothing_left()
        return self.process.returncode

    def members(self) -> list[psutil.Process]:
        """The daemons below `lockstep serve`, and whatever they started."""
        try:
            now = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            now = []
        self._members.update(now)
        return now

    def adopt(self, pid: int) -> None:
        """Counts a process among those that must not be left."""
        self._members.add(psutil.Process(pid))

    def log_text(self) -> str:
        """What all daemons have said so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def client(self) -> Client:
        return Client(self.address)

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(
            self.address,
            options=[("grpc.enable_http_proxy", 0), ("grpc.max_send_message_length", -1)],
        )

    def stub(self, channel: grpc.Channel) -> generate_pb2_grpc.GenerateServiceStub:
        return generate_pb2_grpc.GenerateServiceStub(channel)

    def __enter__(self) -> Self:
        return self.wait_ready()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _kill_all(self) -> None:
        for process in [*self.members(), *self._members]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.kill()
        self.process.wait(STOP_LIMIT_S)

    def _assert_nothing_left(self) -> None:
        _, alive = psutil.wait_procs(self._members, timeout=5)
        names = [" ".join(process.cmdline()) for process in alive if process.is_running()]
        for process in alive:
            process.kill()
        assert not names, f"left running: {names}"
        shared = {path.name for path in _SHARED_MEMORY.iterdir()} - self._shared_before
        assert not shared, f"left in {_SHARED_MEMORY}: {shared}"
        files = [str(path) for path in self._tmp.rglob("*")]
        files += [str(self._ready)] if self._ready.exists() else []
        assert not files, f"files left: {files}"


def scrape(address: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Samples at http://address/metrics by (name, labels without model_name)."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{address}/metrics", timeout=10) as response:
        text = response.read().decode("utf-8")
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key != "model_name"}
            samples[sample.name, tuple(sorted(labels.items()))] = sample.value
    return samples


def value_of(address: str, name: str, **labels: str) -> float:
    """One sample of the coordinator's or a worker's metrics; KeyError if there is none."""
    return scrape(address)[name, tuple(sorted(labels.items()))]
