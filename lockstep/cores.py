"""How many CPU cores this process may really use: the affinity and the cgroup, not the host."""

import os
from collections.abc import Iterator
from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def available_cores(cgroup_root: Path = _CGROUP_ROOT, own_cgroups: Path = _OWN_CGROUPS) -> int:
    """Cores by affinity, lowered to the tightest CPU quota of our cgroup and those around it."""
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota(cgroup_root, own_cgroups)
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(cgroup_root: Path, own_cgroups: Path) -> float | None:
    """Cores that cgroup v2 (`cpu.max`) or v1 (`cpu.cfs_quota_us`) grants; None: no limit."""
    lines = own_cgroups.read_text().splitlines() if own_cgroups.exists() else []
    quotas: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            quotas += _v2_quotas(cgroup_root, path)
        elif "cpu" in controllers.split(","):
            quotas += _v1_quotas(cgroup_root / "cpu", path)
    return min(quotas, default=None)


def _v2_quotas(root: Path, path: str) -> Iterator[float]:
    for folder in _from_root(root, path):
        file = folder / "cpu.max"
        if file.exists():
            quota, period = file.read_text().split()
            if quota != "max":
                yield int(quota) / int(period)


def _v1_quotas(root: Path, path: str) -> Iterator[float]:
    for folder in _from_root(root, path):
        file = folder / "cpu.cfs_quota_us"
        if file.exists() and (quota := int(file.read_text())) > 0:
            yield quota / int((folder / "cpu.cfs_period_us").read_text())


def _from_root(root: Path, path: str) -> Iterator[Path]:
    """The cgroup and those around it. In a container the path may name what only the host sees."""
    folder = root
    yield folder
    for part in Path(path.lstrip("/")).parts:
        folder = folder / part
        yield folder
