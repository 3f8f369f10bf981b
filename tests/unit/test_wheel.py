"""The built wheel, alone in an empty environment, is the whole product."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("protos", "tpcomm", "worker", "coordinator", "lockstep", "bench")

pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, **environ: str) -> str:
    finished = subprocess.run(
        command,
        cwd=cwd,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build folder in the clone could hold modules that are gone."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist"]
    run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_every_package_with_types_and_protos(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    assert "protos/lockstep/v1/generate.proto" in names
    assert "protos/lockstep/v1/generate_pb2.pyi" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "scripts/")) for name in names)


def test_the_wheel_in_an_empty_environment_prints_its_version_and_serves(
    wheel: Path, tmp_path: Path, smollm2_dir: Path
) -> None:
    home = tmp_path / "an empty environment"
    venv.create(home, with_pip=True, symlinks=True)
    python = str(home / "bin" / "python")
    pins = ["--constraint", str(ROOT / "constraints" / "cpu.txt")]
    run(python, "-m", "pip", "install", "--quiet", *pins, str(wheel), cwd=tmp_path)
    shown = run(str(home / "bin" / "lockstep"), "--version", cwd=tmp_path)
    assert shown.split()[-1] == wheel.name.split("-")[1]
    answer = run(python, "-m", "lockstep", "demo", cwd=tmp_path, DEMO_MODEL=str(smollm2_dir))
    assert "Paris" in answer
