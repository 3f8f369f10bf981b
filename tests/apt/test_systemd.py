"""systemd's own tools on the units, in a root of their own where everything they name exists."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.apt

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
SYSTEM_UNITS = Path("/lib/systemd/system")
UNITS = ("lockstep-coordinator.service", "lockstep-worker@.service")
LOADED = ("lockstep-coordinator.service", "lockstep-worker@0.service", "lockstep.target")
MAX_EXPOSURE = 35  # in tenths: "security" calls 50 and more exposed


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A host on which Lockstep has been installed."""
    staged = tmp_path / "root"
    (staged / "opt/lockstep/bin").mkdir(parents=True)
    (staged / "etc").mkdir()
    shutil.copytree(SYSTEM_UNITS, staged / "usr/lib/systemd/system", symlinks=True)
    (staged / "lib").symlink_to("usr/lib")
    for path in (*FOLDER.glob("*.service"), *FOLDER.glob("*.target")):
        shutil.copy(path, staged / "usr/lib/systemd/system")
    for kind in ("sysusers", "tmpfiles"):
        (staged / f"usr/lib/{kind}.d").mkdir()
        shutil.copy(FOLDER / f"lockstep.{kind}", staged / f"usr/lib/{kind}.d/lockstep.conf")
    program = staged / "opt/lockstep/bin/lockstep"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    yield staged


def verify(root: Path) -> subprocess.CompletedProcess[str]:
    options = ("--man=no", "--recursive-errors=no", f"--root={root}")
    return call("systemd-analyze", "verify", *options, *LOADED)


def test_systemd_takes_every_unit_without_a_word(root: Path) -> None:
    verified = verify(root)
    assert (verified.returncode, verified.stderr) == (0, "")


@pytest.mark.parametrize(
    ("written", "wrong"),
    [
        ("Type=notify", "Type=notified"),
        ("RestartSec=", "RestartSeconds="),
        ("/opt/lockstep/bin/lockstep ", "/opt/lockstep/bin/lockstop "),
        ("SystemCallFilter=@system-service", "SystemCallFilter=@no-such-set"),
    ],
)
def test_a_unit_that_is_wrong_is_noticed(root: Path, written: str, wrong: str) -> None:
    for unit in UNITS:
        path = root / "usr/lib/systemd/system" / unit
        assert written in path.read_text()
        path.write_text(path.read_text().replace(written, wrong))
    verified = verify(root)
    assert verified.returncode != 0 or verified.stderr


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_leaves_little_of_the_host_exposed(unit: str) -> None:
    options = ("--offline=true", f"--threshold={MAX_EXPOSURE}")
    rated = call("systemd-analyze", "security", *options, str(FOLDER / unit))
    assert rated.returncode == 0, rated.stdout[-2000:]


def test_a_unit_without_its_hardening_is_over_the_threshold(tmp_path: Path) -> None:
    bare = tmp_path / UNITS[0]
    text = (FOLDER / UNITS[0]).read_text()
    bare.write_text(text.partition("ProtectSystem=")[0])
    options = ("--offline=true", f"--threshold={MAX_EXPOSURE}")
    assert call("systemd-analyze", "security", *options, str(bare)).returncode != 0


def test_user_and_folders_are_made(root: Path) -> None:
    made = call("systemd-sysusers", f"--root={root}")
    assert made.returncode == 0, made.stderr
    users = (root / "etc/passwd").read_text()
    assert any(line.startswith("lockstep:") for line in users.splitlines())
    made = call("systemd-tmpfiles", f"--root={root}", "--create", "lockstep.conf")
    assert made.returncode == 0, made.stderr
    for folder in ("var/lib/lockstep/models", "var/cache/lockstep", "etc/lockstep"):
        assert (root / folder).is_dir(), folder
