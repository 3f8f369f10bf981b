"""Real daemons under a service manager: ready, alive while steps progress, stopping."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lockstep.daemon.exit_codes import ExitCode
from lockstep.errors import CallFailed
from tests.helpers.message_client import Client, ids_request
from tests.helpers.notify_socket import NotifySocket
from tests.helpers.served_group import serve_environ
from tests.helpers.tiny_models import write_tiny_model
from tests.integration.test_daemons_alone import START_LIMIT_S, HandStarted

STEP_TIMEOUT_S = 14.0
WORKER_WATCHDOG_S = 4.0
COORDINATOR_WATCHDOG_S = 15.0  # must be above the step timeout
FEED_PERIOD_S = 1.0


class Managed:
    """A daemon and the service manager that it tells how it is."""

    def __init__(
        self, stack: contextlib.ExitStack, folder: Path, watchdog_s: float, *words: str
    ) -> None:
        self.manager = stack.enter_context(NotifySocket())
        environ = {
            "NOTIFY_SOCKET": self.manager.name,
            "WATCHDOG_USEC": str(int(watchdog_s * 1e6)),
        }
        files = ("--metrics-port", "0", "--port", "0", "--ready-file", str(folder / "ready.json"))
        self.daemon = HandStarted(folder, *words, *files, environ=environ)
        stack.callback(self.daemon.close)

    def wait_until_starved(self, limit_s: float) -> None:
        """Returns once two feeding times have passed without a WATCHDOG."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            self.manager.read()
            try:
                self.manager.wait_for("WATCHDOG=1", 2 * FEED_PERIOD_S)
            except AssertionError:
                return
        raise AssertionError(f"still fed after {limit_s:g} s: {self.manager.messages}")


def generate_until_told(client: Client, is_told: threading.Event) -> None:
    """Requests one after another, so that steps are owed whenever a rank is stopped."""
    while not is_told.is_set():
        request = ids_request([5, 6, 7], temperature=0.0, max_tokens=200, ignore_eos=True)
        with contextlib.suppress(CallFailed):  # UNAVAILABLE if the stall outlasts its limit
            client.generate_unary(request, timeout_s=60)


def test_a_stalled_rank_starves_every_watchdog_until_it_goes_on(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    write_tiny_model(model)
    with contextlib.ExitStack() as stack:
        words = ("worker", "--model", str(model), "--device", "cpu", "--num-threads", "1")
        workers = [
            Managed(stack, tmp_path / f"worker{rank}", WORKER_WATCHDOG_S, *words)
            for rank in range(2)
        ]
        for worker in workers:
            worker.manager.wait_for("READY=1", START_LIMIT_S)
        coordinator = Managed(
            stack,
            tmp_path / "coordinator",
            COORDINATOR_WATCHDOG_S,
            *("coordinator", "--model", str(model), "--dtype", "float32"),
            *("--workers", ",".join(worker.daemon.address() for worker in workers)),
            *("--step-timeout", str(STEP_TIMEOUT_S), "--kv-cache-bytes", "16M"),
            *("--max-num-seqs", "8"),
        )
        coordinator.manager.wait_for("READY=1", START_LIMIT_S)
        daemons = [coordinator, *workers]
        for managed in daemons:
            managed.manager.wait_for("WATCHDOG=1", START_LIMIT_S)
        workers[0].manager.wait_for("STATUS=rank 0 of 2: ready", START_LIMIT_S)

        client = stack.enter_context(Client(coordinator.daemon.address()))
        is_told = threading.Event()
        load = threading.Thread(target=generate_until_told, args=(client, is_told))
        load.start()
        try:
            coordinator.manager.wait_for("STATUS=serving tiny on 2 rank(s), 1 running", 30)
            workers[1].daemon.process.send_signal(signal.SIGSTOP)
            for managed in daemons:
                managed.wait_until_starved(STEP_TIMEOUT_S)
        finally:
            is_told.set()
            workers[1].daemon.process.send_signal(signal.SIGCONT)
            load.join(90)
        for managed in daemons:
            managed.manager.wait_for("WATCHDOG=1", START_LIMIT_S)

        coordinator.daemon.process.terminate()
        for managed in daemons:
            managed.manager.wait_for("STOPPING=1", START_LIMIT_S)
            assert managed.daemon.wait() == ExitCode.CLEAN


def test_a_simulated_worker_tells_the_manager_and_answers_probes(tmp_path: Path) -> None:
    model, ready = tmp_path / "tiny", tmp_path / "ready.json"
    write_tiny_model(model)
    words = ["--model", str(model), "--port", "0", "--metrics-port", "0", "--ready-file"]
    with NotifySocket() as manager:
        worker = subprocess.Popen(
            [sys.executable, "-m", "worker.simulated", *words, str(ready)],
            env={**serve_environ(tmp_path), "NOTIFY_SOCKET": manager.name},
            cwd=Path(__file__).resolve().parents[2],
        )
        try:
            manager.wait_for("READY=1", START_LIMIT_S)
            with grpc.insecure_channel(json.loads(ready.read_text())["grpc"]) as channel:
                request = health_pb2.HealthCheckRequest(service="liveness")
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            worker.terminate()
            manager.wait_for("STOPPING=1", START_LIMIT_S)
            assert worker.wait(START_LIMIT_S) == ExitCode.CLEAN
        finally:
            worker.kill()
            worker.wait()


def test_a_watchdog_that_would_bite_before_the_step_timeout_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    write_tiny_model(model)
    with contextlib.ExitStack() as stack:
        words = ("coordinator", "--model", str(model), "--workers", "127.0.0.1:1")
        coordinator = Managed(stack, tmp_path / "coordinator", 30.0, *words)
        assert coordinator.daemon.wait() == ExitCode.CONFIG
        assert "WATCHDOG_USEC) is 30 s; it must be above --step-timeout 30" in (
            coordinator.daemon.log_text()
        )
