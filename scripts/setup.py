"""Fills the venv that runs it: the right build of torch, then everything else at pinned versions.

Run by scripts/setup.sh. Standard library only: nothing is installed yet. What was done is noted in
a stamp; the same inputs need no second run, and an interrupted run goes on where pip left off.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAMP_NAME = "lockstep-setup.sha256"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_SIZE_CPU = "about 725 MB"
_SIZE_CUDA = "about 2.8 GB"


class SetupError(Exception):
    """Setup cannot go on; the message is one line and says what to do."""


@dataclass(frozen=True)
class Plan:
    """Which torch is installed: constraints file, where from, and why, in words."""

    constraints: Path
    pip_options: tuple[str, ...]
    reason: str
    download: str


def main(environ: Mapping[str, str]) -> int:
    """Install what is missing. Returns the exit status."""
    started = time.monotonic()
    kind, reason = choose_kind(environ)
    constraints = ROOT / "constraints" / f"{kind}.txt"
    stamp = Path(sys.prefix) / STAMP_NAME
    wanted = fingerprint(constraints)
    if stamp.is_file() and stamp.read_text() == wanted:
        return 0
    try:
        plan = make_plan(kind, reason, constraints)
        print(f"setup: torch {pinned(constraints, 'torch')}: {plan.reason}", flush=True)
        print(f"setup: download {plan.download}, less what pip has cached", flush=True)
        install(plan)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stamp.write_text(wanted)
    print(f"setup: done in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def choose_kind(environ: Mapping[str, str]) -> tuple[str, str]:
    """("cpu" or "cuda", why). TORCH=cpu or TORCH=cuda decides; else whether there is a GPU."""
    asked = environ.get("TORCH", "")
    if asked in ("cpu", "cuda"):
        return asked, f"{asked} build, asked for by TORCH={asked}"
    if asked:
        raise SystemExit(f"error: TORCH={asked}: it may be cpu or cuda")
    gpus = nvidia_gpus()
    if gpus:
        return "cuda", f"CUDA build, because this machine has {gpus}"
    return "cpu", "CPU build preferred, because no NVIDIA GPU answers here (TORCH=cuda overrides)"


def nvidia_gpus() -> str:
    """What nvidia-smi lists, as "2x NVIDIA H100", or "" when there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    names = listed.stdout.split("\n")[:-1] if listed.returncode == 0 else []
    return f"{len(names)}x {names[0]}" if names else ""


def make_plan(kind: str, reason: str, constraints: Path) -> Plan:
    """Decide where torch comes from.

    pip's own configuration is asked first, since a CPU build may lie on its index or disk. Where
    it offers only a CUDA build, the CPU index of the torch project is asked; where that cannot be
    reached either, the CUDA build is taken: it runs without a GPU too.
    """
    if kind == "cuda":
        return Plan(constraints, (), reason, _SIZE_CUDA)
    requirement = f"torch=={pinned(constraints, 'torch')}"
    found = offered(requirement)
    if found == "installed":
        return Plan(constraints, (), f"{reason}; already installed", "at most 500 MB")
    if is_cpu_build(found):
        place = "on this machine's disk" if found.startswith("file:") else "on pip's index"
        return Plan(constraints, (), f"{reason}; found {place}", _SIZE_CPU)
    options = ("--index-url", CPU_INDEX, "--retries", "1", "--timeout", "20")
    if is_cpu_build(offered(requirement, *options)):
        return Plan(constraints, options[:2], f"{reason}; found on {CPU_INDEX}", _SIZE_CPU)
    if not found:
        raise SetupError(
            f"neither pip's index nor {CPU_INDEX} offers {requirement} for this Python and machine "
            f"({sys.version.split()[0]}): check the network and `pip config list`"
        )
    reason = f"no CPU build found on pip's index or {CPU_INDEX}, so the CUDA build, which runs on "
    return Plan(constraints, (), reason + "CPUs as well", _SIZE_CUDA)


def is_cpu_build(url: str) -> bool:
    """Whether the file behind this URL is a torch without CUDA."""
    return "%2Bcpu" in url or "+cpu" in url


def offered(requirement: str, *options: str) -> str:
    """URL of the file that pip would take for `requirement`; "installed", or "" for none."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        ask = ["install", "--dry-run", "--quiet", "--no-deps", "--only-binary=:all:"]
        command = pip_command(*ask, "--report", str(report), *options, requirement)
        asked = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=600, check=False
        )
        if asked.returncode != 0:
            return ""
        found = json.loads(report.read_text())["install"]
    return str(found[0]["download_info"]["url"]) if found else "installed"


def install(plan: Plan) -> None:
    """Run pip. Raises SetupError when it fails; a second run goes on from there."""
    pins = ("--constraint", str(plan.constraints))
    run_pip("install", *pins, "setuptools")
    if plan.pip_options:
        # Only torch: the CPU index holds no other package at our versions.
        requirement = f"torch=={pinned(plan.constraints, 'torch')}"
        run_pip("install", "--no-deps", *plan.pip_options, requirement)
    run_pip("install", *pins, "--no-build-isolation", "--editable", ".[dev]")


def run_pip(*arguments: str) -> None:
    """pip in this venv, its output shown. Raises SetupError when it fails."""
    finished = subprocess.run(
        pip_command(*arguments, "--quiet"), cwd=ROOT, stdin=subprocess.DEVNULL, check=False
    )
    if finished.returncode != 0:
        raise SetupError(
            f"pip {' '.join(arguments)} failed (above): mend it and run `make setup` again"
        )


def pip_command(*arguments: str) -> list[str]:
    """The venv's own pip, by module: its script would not survive a space in the path."""
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


def pinned(constraints: Path, package: str) -> str:
    """The version that a constraints file gives a package."""
    for line in constraints.read_text().splitlines():
        name, _, version = line.partition("==")
        if name == package:
            return version
    raise SetupError(f"{constraints.name} does not pin {package}")


def fingerprint(constraints: Path) -> str:
    """Digest of everything that decides what is installed, and of where."""
    digest = hashlib.sha256(f"{sys.version}\n{ROOT}\n".encode())
    for path in (constraints, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main(os.environ))
