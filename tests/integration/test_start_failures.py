"""What stops a start: one line that says what and how to mend it, and its exit code."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.version import __version__
from tests.helpers.served_group import ServedGroup, serve_environ
from tests.helpers.tiny_models import write_tiny_model

_LIMIT_S = 90.0
_NEWER_WORKER = """
import sys
from lockstep.daemon import version
version.__version__ = "9.9.9"
from worker.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def model(tiny_dir: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be broken."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


@pytest.fixture
def refused(model: Path, tmp_path: Path) -> Callable[..., str]:
    """Serves the model with flags, expects that exit code, returns what was said."""

    def serve(code: ExitCode, *flags: str, **environ: str) -> str:
        group = ServedGroup(
            model,
            tmp_path / "group",
            *("--num-threads", "1", "--kv-cache-bytes", "64K", "--max-model-len", "64"),
            *flags,
            environ=serve_environ(tmp_path) | environ,
        )
        assert group.wait_exit(_LIMIT_S) == code, group.log_text()
        said = group.log_text()
        assert "Traceback" not in said, said
        return said

    return serve


def the_line(said: str, *words: str) -> None:
    """Asserts that exactly one line has all the words."""
    lines = [line for line in said.splitlines() if all(word in line for word in words)]
    assert len(lines) == 1, f"{len(lines)} lines with {words} in:\n{said}"


def change_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | changes), encoding="utf-8")


def test_missing_weights(model: Path, refused: Callable[..., str]) -> None:
    (model / "model.safetensors").unlink()
    the_line(refused(ExitCode.CHECKPOINT), "model.safetensors", "found neither")


def test_truncated_weights(model: Path, refused: Callable[..., str]) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    the_line(refused(ExitCode.CHECKPOINT), "model.safetensors", "bytes")


def test_weights_of_other_shapes(model: Path, refused: Callable[..., str]) -> None:
    change_config(model, intermediate_size=136)
    the_line(refused(ExitCode.CHECKPOINT), "gate_proj", "expected shape", "136", "200")


def test_weights_of_another_model(model: Path, refused: Callable[..., str]) -> None:
    change_config(model, num_hidden_layers=3)
    the_line(refused(ExitCode.CHECKPOINT), "model.layers.2", "found no such tensor")


def test_unsupported_architecture(model: Path, refused: Callable[..., str]) -> None:
    change_config(model, architectures=["MambaForCausalLM"], model_type="mamba")
    the_line(refused(ExitCode.CHECKPOINT), "mamba", "supported: llama")


def test_config_key_that_changes_arithmetic(model: Path, refused: Callable[..., str]) -> None:
    change_config(model, quantization_config={"quant_method": "gptq"})
    the_line(refused(ExitCode.CHECKPOINT), "quantization_config", "gptq")


def test_config_that_is_no_json(model: Path, refused: Callable[..., str]) -> None:
    (model / "config.json").write_text("{", encoding="utf-8")
    the_line(refused(ExitCode.CHECKPOINT), "config.json", "worker:")


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_port_in_use(refused: Callable[..., str], flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        the_line(refused(ExitCode.ADDRESS, flag, port), port, "in use", "choose another")


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_port_of_a_worker_in_use(tiny_dir: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ports = {"--port": "0", "--metrics-port": "0"} | {flag: port}
        worker = subprocess.run(
            [sys.executable, "-m", "worker", "--model", str(tiny_dir)]
            + [word for pair in ports.items() for word in pair],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
        )
    assert worker.returncode == ExitCode.ADDRESS
    assert worker.stderr.count("\n") == 1, worker.stderr
    the_line(worker.stderr, port, "in use", f"choose another {flag} ")


def test_more_ranks_than_query_heads(tmp_path: Path) -> None:
    model = tmp_path / "two heads"
    write_tiny_model(model, num_attention_heads=2, num_key_value_heads=1)
    flags = ("--tp", "3", "--num-threads", "1", "--kv-cache-bytes", "64K")
    group = ServedGroup(model, tmp_path / "group", *flags)
    code = group.wait_exit(_LIMIT_S)
    assert code in (ExitCode.CONFIG, ExitCode.CHECKPOINT), group.log_text()
    assert "Traceback" not in group.log_text()
    said = [line for line in group.log_text().splitlines() if "heads" in line]
    assert said and all("2" in line and "3" in line for line in said), group.log_text()


def test_gpus_that_are_not_there(refused: Callable[..., str]) -> None:
    said = refused(ExitCode.CONFIG, "--devices", "0", CUDA_VISIBLE_DEVICES="")
    the_line(said, "--devices names GPU 0", "0 GPUs")


def test_nccl_without_gpus(refused: Callable[..., str]) -> None:
    the_line(refused(ExitCode.CONFIG, "--tp", "2", "--comm", "nccl"), "--comm nccl", "CPUs", "shm")


def test_context_that_does_not_fit_the_cache(refused: Callable[..., str]) -> None:
    said = refused(ExitCode.CONFIG, "--max-model-len", "4000")
    the_line(said, "--max-model-len 4000", "--kv-cache-bytes")


def test_unknown_flag_setting_and_value(refused: Callable[..., str]) -> None:
    the_line(refused(ExitCode.CONFIG, "--colour", "red"), "--colour")


def test_unknown_setting_in_the_environment(refused: Callable[..., str]) -> None:
    the_line(refused(ExitCode.CONFIG, LOCKSTEP_COLOUR="red"), "LOCKSTEP_COLOUR")


def test_value_that_the_coordinator_refuses(refused: Callable[..., str]) -> None:
    the_line(refused(ExitCode.CONFIG, "--dtype", "int4"), "--dtype", "int4", "bfloat16")


def test_worker_of_another_version(model: Path, tmp_path: Path) -> None:
    environ = serve_environ(tmp_path, PYTHONPATH=str(Path(__file__).parents[2]))
    ready = tmp_path / "worker.json"
    flags = ["--model", str(model), "--port", "0", "--metrics-port", "0"]
    worker = subprocess.Popen(
        [sys.executable, "-c", _NEWER_WORKER, *flags, "--ready-file", str(ready)], env=environ
    )
    try:
        while not ready.exists():
            with pytest.raises(subprocess.TimeoutExpired):
                worker.wait(0.05)
        address = json.loads(ready.read_text(encoding="utf-8"))["grpc"]
        coordinator = subprocess.run(
            [sys.executable, "-m", "lockstep.cli", "coordinator", *flags, "--workers", address],
            env=environ,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
        )
        assert coordinator.returncode == ExitCode.CONFIG, coordinator.stderr
        the_line(coordinator.stderr, __version__, "9.9.9")
    finally:
        worker.kill()
        worker.wait(10)
