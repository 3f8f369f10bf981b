"""What `lockstep doctor` reports about torch, GPUs and NCCL, and what follows from it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lockstep.cores import available_cores
from lockstep.findings import Finding, Status

_NVIDIA_SMI_LIMIT_S = 20.0
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def torch_findings(probe: dict[str, Any]) -> Iterator[Finding]:
    """Which torch and triton there are."""
    if "failed" in probe:
        yield Finding("torch", "torch", probe["failed"], Status.MISSING, "make setup")
        return
    build = f"CUDA {probe['cuda']}" if probe["cuda"] else "CPU build"
    yield Finding("torch", "torch", f"{probe['version']}, {build}, {probe['cpu_capability']}")
    if probe["triton"]:
        yield Finding("torch", "triton", probe["triton"])
    elif probe["gpus"]:
        remedy = "install the triton that this torch names (pip show torch)"
        yield Finding("torch", "triton", "absent", Status.MISSING, remedy)


def gpu_findings(
    probe: dict[str, Any], driver_file: Path = _DRIVER_FILE, num_listed: int | None = None
) -> Iterator[Finding]:
    """The driver and each GPU; a GPU that torch does not see is a note with its remedy.

    `num_listed` is how many GPUs nvidia-smi lists; None asks it.
    """
    driver = driver_version(driver_file)
    listed = count_listed_gpus() if num_listed is None else num_listed
    if driver:
        yield Finding("GPU", "driver", driver)
    gpus = probe.get("gpus", [])
    for index, gpu in enumerate(gpus):
        yield _gpu_finding(index, gpu, len(gpus))
    if gpus or "failed" in probe:
        return
    if driver or listed:
        if probe["cuda"]:
            remedy = (
                f"CUDA {probe['cuda']} needs a newer driver, or CUDA_VISIBLE_DEVICES hides them"
            )
        else:
            remedy = "this torch is a CPU build: TORCH=cuda make setup"
        yield Finding("GPU", "GPUs", f"{listed} listed, none usable", Status.NOTE, remedy)
    else:
        yield Finding("GPU", "GPUs", "none: ranks run on the CPU")


def _gpu_finding(index: int, gpu: dict[str, Any], num_gpus: int) -> Finding:
    major, minor = gpu["capability"]
    gib = 2**30
    text = (
        f"{gpu['name']}, compute capability {major}.{minor}, "
        f"{gpu['free_bytes'] / gib:.1f} GiB free of {gpu['total_bytes'] / gib:.1f}"
    )
    if num_gpus > 1:
        text += f", reaches {len(gpu['peers'])} of {num_gpus - 1} peers"
    if major < 8:
        return Finding("GPU", f"GPU {index}", text, Status.NOTE, "bfloat16 needs capability 8.0")
    return Finding("GPU", f"GPU {index}", text)


def driver_version(driver_file: Path) -> str:
    """Version of NVIDIA's kernel driver, or "" without one."""
    if not driver_file.exists():
        return ""
    match = re.search(r"\b(\d{3}\.\d+(\.\d+)?)\b", driver_file.read_text())
    return match[1] if match else "unknown version"


def count_listed_gpus() -> int:
    """GPUs that nvidia-smi lists; 0 where it is absent, fails or hangs."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        listed = subprocess.run(
            [program, "-L"],
            capture_output=True,
            text=True,
            timeout=_NVIDIA_SMI_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def nccl_findings(probe: dict[str, Any], torch_probe: dict[str, Any]) -> Iterator[Finding]:
    """Which libnccl would be loaded. Without several GPUs none is needed."""
    if "version" in probe:
        yield Finding("NCCL", "libnccl", f"{nccl_release(probe['version'])} ({probe['path']})")
        return
    reason = probe.get("missing") or probe["failed"]
    if len(torch_probe.get("gpus", [])) > 1:
        cuda = str(torch_probe["cuda"]).partition(".")[0]
        remedy = f"pip install nvidia-nccl-cu{cuda}, or --nccl-path: {reason}"
        yield Finding("NCCL", "libnccl", "absent", Status.MISSING, remedy)
    else:
        yield Finding("NCCL", "libnccl", "absent; needed for several GPUs only")


def nccl_release(version: int) -> str:
    """ncclGetVersion's number in words: 22809 is 2.28.9 (nccl.h, NCCL_VERSION)."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def use_findings(torch_probe: dict[str, Any], nccl_probe: dict[str, Any]) -> Iterator[Finding]:
    """What `lockstep serve` would do here without further flags."""
    gpus = torch_probe.get("gpus", [])
    if gpus:
        yield Finding("use", "devices", f"GPUs, up to {len(gpus)} ranks")
        has_nccl = "version" in nccl_probe
        comm = f"NCCL {nccl_release(nccl_probe['version'])}" if has_nccl else "one rank only"
        yield Finding("use", "collectives", comm)
        return
    cores = available_cores()
    yield Finding("use", "devices", f"CPU, {cores} threads divided among the ranks")
    yield Finding("use", "collectives", "shared memory (--comm gloo across hosts)")
