"""The benchmark of a first token's way, with few requests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 100


def test_no_first_token_comes_before_its_step_has_ended(smollm2_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "first-token", "--model", str(smollm2_dir)]
    command += ["--step-ms", "20", "--arrivals", "5", "--results", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert run.returncode == 0, run.stderr
    cases = json.loads(run.stdout.splitlines()[-1])["cases"]
    assert [case["case"] for case in cases] == [
        "step20ms-arrival-alone",
        "step20ms-arrival-amid64",
    ]
    assert [case["floor"] for case in cases] == [20.0, 30.0]
    assert all(len(case["runs"]) == 5 and min(case["runs"]) > 20.0 for case in cases)
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_text(encoding="utf-8"))["cases"] == cases
