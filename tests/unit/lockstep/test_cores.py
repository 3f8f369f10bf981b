"""Cores by affinity and cgroup."""

import os
from pathlib import Path

import pytest

from lockstep.cores import available_cores, cpu_quota


def _own(folder: Path, text: str) -> Path:
    file = folder / "own"
    file.write_text(text, encoding="utf-8")
    return file


def test_without_a_quota_the_affinity_counts(tmp_path: Path) -> None:
    own = _own(tmp_path, "0::/\n")
    assert available_cores(tmp_path, own) == len(os.sched_getaffinity(0))


def test_narrow_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    assert available_cores(tmp_path, _own(tmp_path, "0::/\n")) == 1


def test_tightest_v2_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("400000 100000\n")
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    own = _own(tmp_path, "0::/outer/inner\n")
    assert cpu_quota(tmp_path, own) == 1.5
    assert available_cores(tmp_path, own) == 1


def test_v1_quota_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "cpu" / "job"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("350000\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    (group.parent / "cpu.cfs_quota_us").write_text("-1\n")
    own = _own(tmp_path, "3:memory:/x\n2:cpu,cpuacct:/job\n0::/\n")
    assert cpu_quota(tmp_path, own) == 3.5
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert available_cores(tmp_path, own) == 3


def test_quota_below_one_core_still_gives_one(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("20000 100000\n")
    assert available_cores(tmp_path, _own(tmp_path, "0::/\n")) == 1
