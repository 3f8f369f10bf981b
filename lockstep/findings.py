"""What `lockstep doctor` reports about the host and the Python packages."""

from __future__ import annotations

import enum
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lockstep.cores import available_cores

# Distributions that the daemons import, torch apart: it has findings of its own.
PACKAGES = (
    "grpcio",
    "grpcio-health-checking",
    "grpcio-reflection",
    "protobuf",
    "numpy",
    "tokenizers",
    "jinja2",
    "llguidance",
    "prometheus-client",
    "uvloop",
    "tqdm",
    "huggingface_hub",
)
# What is missing here costs one feature only.
OPTIONAL_PACKAGES = {
    "gguf": "converting the demo model",
    "safetensors": "converting the demo model",
    "pytest": "make test",
}

_SMALL_SHM_BYTES = 16 * 2**20


class Status(enum.StrEnum):
    """OK; NOTE: works, but should be known; MISSING: nothing runs without it."""

    OK = "ok"
    NOTE = "note"
    MISSING = "missing"


@dataclass(frozen=True)
class Finding:
    """One line of the report. `remedy` says how to get what is missing."""

    topic: str
    item: str
    value: str
    status: Status = Status.OK
    remedy: str = ""


def host_findings(shm: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """System, Python, cores and shared memory of this host."""
    yield Finding("host", "system", f"{platform.system()} {platform.release()}, {_processor()}")
    yield python_finding(sys.version_info[:3], sys.executable)
    usable, total = available_cores(), os.cpu_count() or 1
    yield Finding("host", "cores", f"{usable} usable of {total}")
    yield shm_finding(shm)


def python_finding(version: tuple[int, int, int], executable: str) -> Finding:
    """Whether this Python is one we support."""
    text = f"{'.'.join(map(str, version))} ({executable})"
    if (3, 11) <= version[:2] <= (3, 13):
        return Finding("host", "Python", text)
    return Finding("host", "Python", text, Status.MISSING, "use Python 3.11, 3.12 or 3.13")


def shm_finding(shm: Path) -> Finding:
    """Room in /dev/shm, over which ranks without GPUs talk."""
    if not shm.is_dir():
        remedy = "mount a tmpfs there, or use --comm gloo"
        return Finding("host", str(shm), "absent", Status.NOTE, remedy)
    usage = shutil.disk_usage(shm)
    text = f"{usage.free // 2**20} MiB free of {usage.total // 2**20} MiB"
    if usage.free < _SMALL_SHM_BYTES:
        remedy = "give the container more (--shm-size=64m), or use --comm gloo"
        return Finding("host", str(shm), text, Status.NOTE, remedy)
    return Finding("host", str(shm), text)


def package_findings(
    packages: Iterable[str] = PACKAGES, optional: dict[str, str] | None = None
) -> Iterator[Finding]:
    """Installed versions, and what to install for those that are not."""
    for name in packages:
        version = _version(name)
        if version is None:
            remedy = f"make setup, or pip install {name}"
            yield Finding("package", name, "absent", Status.MISSING, remedy)
        else:
            yield Finding("package", name, version)
    for name, purpose in (OPTIONAL_PACKAGES if optional is None else optional).items():
        version = _version(name)
        if version is None:
            remedy = f"pip install {name}; only {purpose} needs it"
            yield Finding("package", name, "absent", Status.NOTE, remedy)
        else:
            yield Finding("package", name, version)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name as /proc/cpuinfo has it; the architecture where it has none."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
