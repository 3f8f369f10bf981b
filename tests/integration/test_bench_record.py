"""The record run, tried on CPU ranks with a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.tiny_models import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 100
FLAGS = "--dtype float32 --load-format safetensors --max-model-len 512 --batch-sizes 1 --lengths 16"


def test_a_record_run_measures_a_server_and_says_how_each_step_ended(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    model.mkdir()
    write_tiny_model(model, max_position_embeddings=512)
    command = [
        "-m",
        "bench",
        "record",
        "--tp",
        "2",
        "--on-cpu",
        "--results",
        str(tmp_path / "kept"),
    ]
    command += ["--models", f"{model},{tmp_path / 'none'}"]
    command += ["--serving-flags", f"{FLAGS} --cases decode,ttft"]
    run = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )
    steps = json.loads(run.stdout.splitlines()[-1])["steps"]
    assert [step["result"] for step in steps] == ["ok", "failed"], run.stderr
    assert run.returncode == 1
    (kept,) = (tmp_path / "kept").iterdir()
    record = json.loads(kept.read_text(encoding="utf-8"))
    assert [case["case"] for case in record["cases"]] == [
        "decode-bs1",
        "decode-bs1-gap-p99",
        "ttft-16",
    ]
    assert {"load", "join", "capture"} <= record["config"]["startup_phases_s"].keys()
