"""The commands that serve does not need: daemons started by hand, doctor, the demo."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from lockstep.daemon.exit_codes import ExitCode
from lockstep.errors import CallFailed
from tests.helpers.message_client import Client, ids_request
from tests.helpers.served_group import serve_environ
from tests.helpers.tiny_models import write_tiny_model
from tests.integration.chaos_support import wait_until

START_LIMIT_S = 60.0
STOP_LIMIT_S = 15.0
DEMO_LIMIT_S = 60.0


class HandStarted:
    """A `lockstep COMMAND ...` with its output in a file."""

    def __init__(self, folder: Path, *words: str, environ: Mapping[str, str] | None = None) -> None:
        folder.mkdir()
        self._log = folder / "log"
        self.ready_file = folder / "ready.json"
        root = str(Path(__file__).resolve().parents[2])
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "lockstep", *words],
                env={**serve_environ(folder), "PYTHONPATH": root, **(environ or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_hear_ctrl_c,
            )

    def log_text(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def address(self) -> str:
        """host:port, once it serves."""

        def is_ready() -> bool:
            assert self.process.poll() is None, self.log_text()
            return self.ready_file.exists()

        wait_until(is_ready, START_LIMIT_S, self.log_text)
        return str(json.loads(self.ready_file.read_text(encoding="utf-8"))["grpc"])

    def wait(self, limit_s: float = STOP_LIMIT_S) -> int:
        """Its exit code."""
        return self.process.wait(limit_s)

    def close(self) -> None:
        """Kills it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(STOP_LIMIT_S)


def _hear_ctrl_c() -> None:
    """A shell starts its background jobs, this test run perhaps, with the signal ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_worker(stack: contextlib.ExitStack, model: Path, folder: Path, port: int) -> HandStarted:
    """`lockstep worker` on that port."""
    words = ["worker", "--model", str(model), "--device", "cpu", "--num-threads", "1"]
    words += ["--port", str(port), "--metrics-port", "0", "--ready-file"]
    worker = HandStarted(folder, *words, str(folder / "ready.json"))
    stack.callback(worker.close)
    return worker


def start_coordinator(
    stack: contextlib.ExitStack, model: Path, folder: Path, workers: list[str]
) -> HandStarted:
    """`lockstep coordinator` that dials those workers."""
    words = ["coordinator", "--model", str(model), "--workers", ",".join(workers)]
    words += ["--port", "0", "--metrics-port", "0", "--dtype", "float32", "--step-timeout", "3"]
    words += ["--max-num-seqs", "8", "--kv-cache-bytes", "16M", "--ready-file"]
    coordinator = HandStarted(folder, *words, str(folder / "ready.json"))
    stack.callback(coordinator.close)
    return coordinator


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_dir = tmp_path_factory.mktemp("alone") / "tiny"
    write_tiny_model(model_dir)
    return model_dir


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as opened:
        yield opened


def greedy_ids(client: Client) -> list[int]:
    request = ids_request([5, 6, 7], temperature=0.0, max_tokens=8, ignore_eos=True)
    return list(client.generate_unary(request, timeout_s=30).output.token_ids)


def test_a_worker_killed_and_started_again_by_hand_rejoins_its_coordinator(
    stack: contextlib.ExitStack, model: Path, tmp_path: Path
) -> None:
    workers = [start_worker(stack, model, tmp_path / f"worker{rank}", 0) for rank in range(2)]
    addresses = [worker.address() for worker in workers]
    coordinator = start_coordinator(stack, model, tmp_path / "coordinator", addresses)
    client = stack.enter_context(Client(coordinator.address()))
    before = greedy_ids(client)
    epoch = client.server_info().epoch

    workers[1].process.kill()
    # The survivor is told to end, so that it starts afresh like the rank that was lost.
    assert workers[0].wait() in (ExitCode.CLEAN, ExitCode.GROUP_LOST)
    with pytest.raises(CallFailed, match="UNAVAILABLE.*rank 1"):
        greedy_ids(client)
    for rank, address in enumerate(addresses):
        port = int(address.rpartition(":")[2])
        workers[rank] = start_worker(stack, model, tmp_path / f"again{rank}", port)

    def is_back() -> bool:
        server = client.server_info()
        return server.is_ready and server.epoch > epoch

    wait_until(is_back, START_LIMIT_S, coordinator.log_text)
    assert greedy_ids(client) == before
    assert [rank.pid for rank in client.server_info().ranks] == [w.process.pid for w in workers]

    coordinator.process.terminate()
    assert coordinator.wait() == ExitCode.CLEAN
    assert [worker.wait() for worker in workers] == [ExitCode.CLEAN, ExitCode.CLEAN]


def test_workers_outlive_a_killed_coordinator_and_serve_the_next_with_their_weights(
    stack: contextlib.ExitStack, model: Path, tmp_path: Path
) -> None:
    workers = [start_worker(stack, model, tmp_path / f"worker{rank}", 0) for rank in range(2)]
    addresses = [worker.address() for worker in workers]
    first = start_coordinator(stack, model, tmp_path / "first", addresses)
    with Client(first.address()) as client:
        before = greedy_ids(client)
    first.process.kill()

    second = start_coordinator(stack, model, tmp_path / "second", addresses)
    with Client(second.address()) as client:
        assert greedy_ids(client) == before
        pids = [rank.pid for rank in client.server_info().ranks]
    assert pids == [worker.process.pid for worker in workers]
    for worker in workers:
        assert worker.log_text().count("kept the weights") == 1

    second.process.terminate()
    assert second.wait() == ExitCode.CLEAN
    assert [worker.wait() for worker in workers] == [ExitCode.CLEAN, ExitCode.CLEAN]


def test_doctor_says_what_this_host_has(tmp_path: Path) -> None:
    doctor = HandStarted(tmp_path / "doctor", "doctor")
    try:
        assert doctor.wait(START_LIMIT_S) == ExitCode.CLEAN
    finally:
        doctor.close()
    for subject in ("Python", "cores", "/dev/shm", "grpcio", "torch", "libnccl", "collectives"):
        assert re.search(rf"^\S+ +{subject} +(ok|warn|missing)", doctor.log_text(), re.MULTILINE)


@pytest.mark.parametrize("is_answering", [False, True])
def test_the_demo_fails_naming_the_rank_that_was_killed(
    stack: contextlib.ExitStack, smollm2_dir: Path, tmp_path: Path, is_answering: bool
) -> None:
    prompt = "Write a long story about a lighthouse keeper and the sea."
    environ = {"DEMO_MODEL": str(smollm2_dir), "HOME": os.environ.get("HOME", "/")}
    demo = HandStarted(tmp_path / "demo", "demo", "--prompt", prompt, environ=environ)
    stack.callback(demo.close)
    below = psutil.Process(demo.process.pid)
    workers = wait_for_workers(demo, below, num_workers=2)
    if is_answering:
        wait_until(lambda: f"> {prompt}\n" in demo.log_text(), DEMO_LIMIT_S, demo.log_text)
    members = below.children(recursive=True)
    killed_at = time.monotonic()
    workers[1].kill()
    assert demo.wait(30) == 1
    assert time.monotonic() - killed_at < 30
    assert re.search(r"rank 1|worker 1", demo.log_text())
    _, alive = psutil.wait_procs(members, timeout=5)
    assert not alive


def wait_for_workers(
    demo: HandStarted, below: psutil.Process, num_workers: int
) -> list[psutil.Process]:
    """The demo's workers, in order of rank: they are started in that order."""
    found: list[psutil.Process] = []

    def all_run() -> bool:
        assert demo.process.poll() is None, demo.log_text()
        found.clear()
        for process in below.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if "worker" in words and "-m" in words:
                    found.append(process)
        return len(found) == num_workers

    wait_until(all_run, DEMO_LIMIT_S, demo.log_text)
    return sorted(found, key=lambda process: process.pid)


def test_the_demo_ends_with_130_on_ctrl_c(
    stack: contextlib.ExitStack, smollm2_dir: Path, tmp_path: Path
) -> None:
    demo = HandStarted(tmp_path / "demo", "demo", environ={"DEMO_MODEL": str(smollm2_dir)})
    stack.callback(demo.close)
    below = psutil.Process(demo.process.pid)
    wait_for_workers(demo, below, num_workers=2)
    members = below.children(recursive=True)
    demo.process.send_signal(signal.SIGINT)
    assert demo.wait(30) == ExitCode.SECOND_SIGNAL
    _, alive = psutil.wait_procs(members, timeout=5)
    assert not alive
