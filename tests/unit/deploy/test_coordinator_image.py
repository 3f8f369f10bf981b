"""What the coordinator's image installs, in an empty environment: it starts, small, no torch."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from lockstep.daemon.exit_codes import ExitCode

ROOT = Path(__file__).resolve().parents[3]
LOCK = ROOT / "deploy" / "images" / "coordinator.requirements.txt"
MAX_BYTES = 250 << 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.net,
    pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the lock is for Python 3.11"),
]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )


def test_the_lock_is_complete_small_and_starts_a_coordinator(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True, symlinks=True)
    python = str(tmp_path / "env" / "bin" / "python")
    options = ["--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    installed = run(python, "-m", "pip", "install", *options, "-r", str(LOCK))
    assert installed.returncode == 0, installed.stderr
    complete = run(python, "-m", "pip", "check")
    assert complete.returncode == 0, complete.stdout
    folder = tmp_path / "env" / "lib"
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
    assert not any("torch" in path.name for path in (folder / "python3.11/site-packages").iterdir())

    words = ["coordinator", "--model", str(tmp_path), "--workers", "127.0.0.1:1"]
    started = run(python, "-m", "lockstep", *words)
    # It has read its settings and imported everything; the folder is no checkpoint.
    assert started.returncode == ExitCode.CHECKPOINT, started.stderr
    assert "config.json" in started.stderr
