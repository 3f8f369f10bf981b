"""Settings and what the engine reads of a checkpoint."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.__main__ import main
from coordinator.config import coordinator_config
from coordinator.errors import BadCheckpoint, StartRefused
from coordinator.model_config import (
    ModelConfig,
    read_model_config,
    served_max_model_len,
    table_width,
)
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.flags import FlagError
from tests.helpers.engine_harness import make_config

GIVEN = ["--model", "/m/tiny", "--workers", "a:1,b:2"]


def test_defaults_are_those_of_the_design() -> None:
    config = coordinator_config(GIVEN, {})
    assert config.workers == ("a:1", "b:2") and config.world_size == 2
    assert config.served_model_name == "tiny"
    assert (config.max_num_seqs, config.max_batch_tokens, config.block_size) == (256, 2048, 16)
    assert (config.port, config.metrics_port, config.host) == (50051, 9851, "127.0.0.1")
    assert (config.step_timeout, config.drain_seconds, config.startup_timeout) == (30, 30, 600)
    assert (config.max_queue_requests, config.num_frontends) == (1024, 1)
    assert config.max_queue_prompt_tokens == 1_048_576
    assert config.use_graphs and config.prefix_cache


def test_the_environment_may_hold_what_other_daemons_read() -> None:
    environ = {"LOCKSTEP_MAX_NUM_SEQS": "9", "LOCKSTEP_TP": "2", "LOCKSTEP_DEVICES": "0,1"}
    assert coordinator_config(GIVEN, environ).max_num_seqs == 9
    assert coordinator_config([*GIVEN, "--max-num-seqs", "8"], environ).max_num_seqs == 8


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--workers", "a:1"], "--model is missing"),
        (["--model", "/m"], "--workers is missing"),
        ([*GIVEN, "--workers", "a"], "want host:port"),
        ([*GIVEN, "--workers", "a:1,a:1"], "two ranks"),
        (
            [*GIVEN, "--max-batch-tokens", "100"],
            "--max-batch-tokens 100 is below --max-num-seqs 256",
        ),
        ([*GIVEN, "--step-timeout", "0"], "--step-timeout"),
        ([*GIVEN, "--max-queue-prompt-tokens", "0"], "--max-queue-prompt-tokens"),
        ([*GIVEN, "--max-queue-time", "-1"], "--max-queue-time"),
        ([*GIVEN, "--comm", "mpi"], "want one of auto, nccl, shm, gloo"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(argv: list[str], words: str) -> None:
    with pytest.raises(FlagError, match=words):
        coordinator_config(argv, {})


def write_model(folder: Path, **config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_checkpoints_type_and_context_are_read(tmp_path: Path, key: str) -> None:
    write_model(tmp_path, max_position_embeddings=77, **{key: "bfloat16"})
    assert read_model_config(tmp_path) == ModelConfig("bfloat16", 77)


def test_a_checkpoint_without_a_type_is_float32(tmp_path: Path) -> None:
    assert read_model_config(write_model(tmp_path, max_position_embeddings=9)).dtype == "float32"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"dtype": "int4", "max_position_embeddings": 9}, "dtype is 'int4'"),
        ({}, "max_position_embeddings is None"),
        ({"max_position_embeddings": "9"}, "max_position_embeddings is '9'"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(
    tmp_path: Path, config: dict[str, object], words: str
) -> None:
    with pytest.raises(BadCheckpoint, match=words):
        read_model_config(write_model(tmp_path, **config))


def test_the_context_is_what_checkpoint_and_cache_both_hold() -> None:
    config = make_config(["a:1"])  # blocks of 4
    model = ModelConfig("float32", 100)
    assert table_width(config, model) == 100
    assert table_width(config, ModelConfig("float32", 10**7)) == 131072
    assert served_max_model_len(config, model, num_blocks=11) == 40
    assert served_max_model_len(config, model, num_blocks=99) == 100


def test_a_context_that_is_asked_for_must_fit() -> None:
    config = make_config(["a:1"], max_model_len=41)
    model = ModelConfig("float32", 100)
    with pytest.raises(StartRefused, match=r"--max-model-len 41 .* holds 40 tokens") as caught:
        served_max_model_len(config, model, num_blocks=11)
    assert caught.value.exit_code == ExitCode.CONFIG
    assert served_max_model_len(config, model, num_blocks=12) == 41
    with pytest.raises(StartRefused, match="41 is above the checkpoint's .* 40"):
        table_width(config, ModelConfig("float32", 40))


@pytest.fixture
def own_logging() -> Iterator[None]:
    """main() sets up logging for its process, which here is everybody's."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.mark.usefixtures("own_logging")
def test_main_says_in_one_line_why_it_does_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCKSTEP_MODEL", raising=False)
    assert main(["--workers", "a:1"]) == ExitCode.CONFIG
    assert main(["--model", str(tmp_path), "--workers", "a:1"]) == ExitCode.CHECKPOINT
    write_model(tmp_path, max_position_embeddings=10)
    too_long = ["--model", str(tmp_path), "--workers", "a:1", "--max-model-len", "11"]
    assert main(too_long) == ExitCode.CONFIG
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("coordinator: ") for line in lines)
