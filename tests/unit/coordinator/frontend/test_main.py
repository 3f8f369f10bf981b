"""The frontend as a process: exit codes, deaf to signals, dead with its engine."""

import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from coordinator.frontend.__main__ import main
from coordinator.frontend.config import parse_config
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.flags import FlagError
from tests.unit.coordinator.frontend.fake_engine import write_ids_only_model

_WAIT_S = 40.0

# An engine that starts a frontend, tells its pid and port, and does what its last line says.
_ENGINE = """
import os, socket, struct, subprocess, sys, time
from protos.lockstep.v1 import engine_pb2

ours, theirs = socket.socketpair()
frontend = subprocess.Popen(
    [sys.executable, "-m", "coordinator.frontend", "--engine-fd", str(theirs.fileno()),
     "--engine-pid", str(os.getpid()), "--model", sys.argv[1], "--served-model-name", "tiny",
     "--port", sys.argv[2], "--silence-timeout", sys.argv[3]],
    pass_fds=(theirs.fileno(),),
)
theirs.close()

def receive():
    length = struct.unpack("<I", ours.recv(4, socket.MSG_WAITALL))[0]
    return engine_pb2.FrontendMessage.FromString(ours.recv(length, socket.MSG_WAITALL))

def send(**message):
    payload = engine_pb2.EngineMessage(**message).SerializeToString()
    ours.sendall(struct.pack("<I", len(payload)) + payload)

def say_port():
    print(frontend.pid, receive().listening.port, flush=True)
"""


def start_engine(
    model: Path, then: str, silence_timeout: float = 60.0, port: int = 0
) -> subprocess.Popen[str]:
    """Runs the engine above, then `then`."""
    return subprocess.Popen(
        [
            *(sys.executable, "-c", _ENGINE + textwrap.dedent(then)),
            *(str(model), str(port), str(silence_timeout)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def has_ended(pid: int) -> bool:
    """True for a pid that is gone, or a zombie that its new parent has not yet reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_ended(pid: int) -> None:
    """Waits for a process that is not our child."""
    if has_ended(pid):
        return
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ready, _, _ = select.select([descriptor], [], [], _WAIT_S)
        assert ready, f"process {pid} still runs"
    finally:
        os.close(descriptor)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_ids_only_model(tmp_path)


def test_silent_engine_is_killed_and_the_frontend_dies_with_it(model: Path) -> None:
    engine = start_engine(model, "say_port(); time.sleep(600)", silence_timeout=0.3)
    output, errors = engine.communicate(timeout=_WAIT_S)
    assert engine.returncode == -signal.SIGKILL
    assert "said nothing for 0.3 s" in errors
    wait_ended(int(output.split()[0]))


def test_killed_engine_takes_its_frontend_along(model: Path) -> None:
    engine = start_engine(model, "say_port(); time.sleep(600)")
    assert engine.stdout is not None
    pid = int(engine.stdout.readline().split()[0])
    assert not has_ended(pid)
    engine.kill()
    engine.communicate(timeout=_WAIT_S)
    wait_ended(pid)


def test_signals_are_left_to_the_engine_and_drain_exits_clean(model: Path) -> None:
    then = """
        import signal
        say_port()
        frontend.send_signal(signal.SIGTERM)
        frontend.send_signal(signal.SIGINT)
        send(state=engine_pb2.GroupState())
        send(drain=engine_pb2.Drain(budget_seconds=5))
        sys.exit(frontend.wait(30))
    """
    engine = start_engine(model, then)
    _, errors = engine.communicate(timeout=_WAIT_S)
    assert engine.returncode == ExitCode.CLEAN, errors


def test_port_in_use_exits_5_with_one_line(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        engine = start_engine(model, "sys.exit(frontend.wait(30))", port=port)
        _, errors = engine.communicate(timeout=_WAIT_S)
    assert engine.returncode == ExitCode.ADDRESS
    lines = [line for line in errors.splitlines() if line.startswith("lockstep frontend:")]
    assert len(lines) == 1
    assert str(port) in lines[0] and "--port" in lines[0]


def test_broken_tokenizer_exits_3_naming_the_file(model: Path) -> None:
    (model / "tokenizer.json").write_text("{broken", encoding="utf-8")
    engine = start_engine(model, "sys.exit(frontend.wait(30))")
    _, errors = engine.communicate(timeout=_WAIT_S)
    assert engine.returncode == ExitCode.CHECKPOINT
    assert "tokenizer.json" in errors


def test_missing_flag_exits_2_naming_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--engine-fd", "3", "--engine-pid", "1", "--model", "x"]) == ExitCode.CONFIG
    assert "--served-model-name" in capsys.readouterr().err


def test_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_PORT", "1234")
    words = ["--engine-fd", "3", "--engine-pid", "1", "--model", "x", "--served-model-name", "n"]
    assert parse_config(words).port == 50051
    with pytest.raises(FlagError, match="colour"):
        parse_config([*words, "--colour", "red"])
