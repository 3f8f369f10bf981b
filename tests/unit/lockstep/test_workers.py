"""`lockstep workers`: command lines, and what happens when a worker ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.flags import FlagError
from lockstep.workers import workers_config

WAIT_S = 30.0

_KEEPER = """
import json, os, sys
from lockstep.processes import supervised_processes
from lockstep.workers import keep_running

with supervised_processes() as processes:
    sys.exit(keep_running(json.loads(sys.argv[1]), os.environ, processes))
"""


def journaling(journal: Path, then: str) -> list[str]:
    """A child that notes its pid and goes on with `then`."""
    note = f"import os, sys, time; open({str(journal)!r}, 'a').write(f'{{os.getpid()}}\\n')"
    return [sys.executable, "-c", f"{note}\n{then}"]


@contextmanager
def kept(commands: dict[str, list[str]]) -> Iterator[subprocess.Popen[str]]:
    root = str(Path(__file__).resolve().parents[3])
    keeper = subprocess.Popen(
        [sys.executable, "-c", _KEEPER, json.dumps(commands)],
        cwd=root,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with keeper:
        try:
            yield keeper
        finally:
            keeper.kill()


def pids(journal: Path) -> list[int]:
    return [int(line) for line in journal.read_text().splitlines()] if journal.exists() else []


def wait_until(is_met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_that_ends_is_started_again_and_the_others_stay(tmp_path: Path) -> None:
    journals = [tmp_path / "0", tmp_path / "1"]
    commands = {str(path): journaling(path, "time.sleep(600)") for path in journals}
    with kept(commands) as keeper:
        wait_until(lambda: all(len(pids(journal)) == 1 for journal in journals))
        os.kill(pids(journals[1])[0], signal.SIGKILL)
        wait_until(lambda: len(pids(journals[1])) == 2)
        assert len(pids(journals[0])) == 1
        keeper.send_signal(signal.SIGTERM)
        assert keeper.wait(WAIT_S) == ExitCode.CLEAN
        for pid in (*pids(journals[0]), *pids(journals[1])):
            assert not Path(f"/proc/{pid}").exists()


def test_a_worker_that_refuses_ends_all_with_its_code(tmp_path: Path) -> None:
    stays, refuses = tmp_path / "stays", tmp_path / "refuses"
    commands = {
        "worker 0": journaling(stays, "time.sleep(600)"),
        "worker 1": journaling(refuses, f"sys.exit({ExitCode.CHECKPOINT.value})"),
    }
    with kept(commands) as keeper:
        assert keeper.wait(WAIT_S) == ExitCode.CHECKPOINT
        assert keeper.stderr is not None and "worker 1" in keeper.stderr.read()
        assert len(pids(refuses)) == 1
        assert all(not Path(f"/proc/{pid}").exists() for pid in pids(stays))


def test_a_worker_that_ends_again_and_again_is_given_up(tmp_path: Path) -> None:
    crashes = tmp_path / "crashes"
    with kept({"worker 0": journaling(crashes, "sys.exit(1)")}) as keeper:
        assert keeper.wait(WAIT_S) == ExitCode.GROUP_LOST
        assert len(pids(crashes)) == 20


def test_each_worker_gets_its_device_and_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lockstep.workers.count_gpus", lambda environ: 4)
    flags = ["--model", "m", "--devices", "1,3", "--port", "6000", "--host", "10.0.0.1"]
    commands = workers_config(flags, {"LOCKSTEP_METRICS_PORT": "7000"}).commands("/m")
    second = commands["worker 1"]
    given = dict(zip(second[4::2], second[5::2], strict=True))
    assert second[1:4] == ["-P", "-m", "worker"]
    assert (given["--device"], given["--port"], given["--host"]) == ("cuda:3", "6001", "10.0.0.1")
    assert given["--metrics-port"] == "7001"


def test_without_devices_every_gpu_gets_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lockstep.workers.count_gpus", lambda environ: 8)
    config = workers_config(["--model", "m"], {"LOCKSTEP_WORKERS": "a:1", "LOCKSTEP_TP": "2"})
    assert config.devices == tuple(f"cuda:{index}" for index in range(8))


@pytest.mark.parametrize("port", ["0", "65535"])
def test_ports_that_cannot_be_counted_up_are_refused(
    monkeypatch: pytest.MonkeyPatch, port: str
) -> None:
    monkeypatch.setattr("lockstep.workers.count_gpus", lambda environ: 2)
    with pytest.raises(FlagError, match=f"--port is {port}; it must be 1 to 65534"):
        workers_config(["--model", "m", "--port", port], {})
