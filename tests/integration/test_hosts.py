"""A coordinator and the workers of several hosts, each host's kept by `lockstep workers`."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from lockstep.daemon.exit_codes import ExitCode
from tests.helpers.message_client import Client
from tests.helpers.tiny_models import write_tiny_model
from tests.integration.chaos_support import wait_until
from tests.integration.test_daemons_alone import (
    START_LIMIT_S,
    HandStarted,
    greedy_ids,
    start_coordinator,
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def health(address: str, service: str) -> tuple[int, str]:
    words = ["-m", "lockstep", "health", "--address", address, "--service", service]
    asked = subprocess.run(
        [sys.executable, *words],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return asked.returncode, asked.stdout + asked.stderr


def test_a_worker_killed_on_one_host_comes_back_and_probes_tell(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    write_tiny_model(model)
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    with contextlib.ExitStack() as stack:
        hosts = []
        for index, address in enumerate(addresses):
            words = ["workers", "--model", str(model), "--devices", "cpu", "--num-threads", "1"]
            words += ["--port", address.rpartition(":")[2], "--metrics-port", str(free_port())]
            hosts.append(HandStarted(tmp_path / f"host{index}", *words))
            stack.callback(hosts[-1].close)
        coordinator = start_coordinator(stack, model, tmp_path / "coordinator", addresses)
        client = stack.enter_context(Client(coordinator.address()))
        before = greedy_ids(client)
        for asked in ((addresses[0], "liveness"), (coordinator.address(), "readiness")):
            assert health(*asked) == (0, "SERVING\n")
        code, said = health(addresses[0], "no-such-service")
        assert (code, "NOT_FOUND" in said) == (1, True)

        epoch = client.server_info().epoch
        psutil.Process(hosts[1].process.pid).children()[0].kill()

        def is_back() -> bool:
            server = client.server_info()
            return server.is_ready and server.epoch > epoch

        wait_until(is_back, START_LIMIT_S, coordinator.log_text)
        assert greedy_ids(client) == before

        coordinator.process.terminate()
        assert coordinator.wait() == ExitCode.CLEAN
        for host in hosts:
            host.process.terminate()
            assert host.wait() == ExitCode.CLEAN
