"""CI's guard against tests that skip themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_skips.py"
RUN = '<testcase classname="t" name="ran"/>'


def check(report: Path, cases: str) -> subprocess.CompletedProcess[str]:
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(report)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def skipped(reason: str, kind: str = "pytest.skip") -> str:
    skip = f'<skipped type="{kind}" message="{reason}"/>'
    return f'<testcase classname="t" name="left_out">{skip}</testcase>'


@pytest.mark.parametrize("reason", ["needs 1 GPU", "needs 2 GPUs"])
def test_a_skip_for_lack_of_gpus_passes(tmp_path: Path, reason: str) -> None:
    assert check(tmp_path / "r.xml", RUN + skipped(reason)).returncode == 0


@pytest.mark.parametrize(
    "case",
    [
        skipped("needs network"),
        skipped("needs 1 GPU or patience"),
        skipped(""),
        skipped("needs 1 GPU", "pytest.xfail"),
    ],
)
def test_any_other_skip_fails_and_is_named(tmp_path: Path, case: str) -> None:
    finished = check(tmp_path / "r.xml", RUN + case)
    assert finished.returncode == 1
    assert "t::left_out" in finished.stderr


def test_a_run_of_no_test_fails(tmp_path: Path) -> None:
    finished = check(tmp_path / "r.xml", skipped("needs 1 GPU"))
    assert finished.returncode == 1
    assert "no test was run" in finished.stderr
