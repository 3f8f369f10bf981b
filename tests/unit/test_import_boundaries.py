"""The walls between the packages, checked on what really gets imported.

Each package is imported whole, every submodule, in one fresh interpreter; what then lies in
sys.modules tells which walls were climbed. A planted violation shows that the check sees one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH = ("torch", "triton", "transformers")
# Leaf modules of the standard library only, which every daemon may share.
SHARED_LEAVES = ("lockstep.daemon",)


@dataclass(frozen=True)
class Wall:
    """What importing all of `package` must not bring in; `allowed` are exceptions to it."""

    package: str
    forbidden: tuple[str, ...]
    allowed: tuple[str, ...] = ()


WALLS = (
    Wall("protos", ("coordinator", "worker", "tpcomm", "lockstep", "bench", *TORCH)),
    Wall(
        "tpcomm", ("protos", "grpc", "coordinator", "worker", "lockstep", "bench", "transformers")
    ),
    Wall("worker", ("coordinator", "lockstep", "bench", "transformers"), SHARED_LEAVES),
    Wall(
        "worker.simulated",
        ("coordinator", "tpcomm", "lockstep", "bench", "tokenizers", *TORCH),
        SHARED_LEAVES,
    ),
    Wall("coordinator", ("worker", "tpcomm", "lockstep", "bench", *TORCH), SHARED_LEAVES),
    Wall("lockstep", ("coordinator", "worker", "tpcomm", "bench", *TORCH)),
    # A light start for programs that only call a server.
    Wall(
        "lockstep.client",
        (
            *("coordinator", "worker", "tpcomm", "bench", "lockstep.daemon.flags", *TORCH),
            *("numpy", "tokenizers", "jinja2", "huggingface_hub", "uvloop", "prometheus_client"),
        ),
    ),
    Wall("lockstep.daemon", ("protos", "grpc", "numpy", "coordinator", "worker", "tpcomm", *TORCH)),
)

# Imports a package and everything below it, prints the names of all modules there are then.
PROBE = """
import importlib, json, pkgutil, sys

def below(package):
    for entry in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        module = importlib.import_module(entry.name)
        if entry.ispkg:
            below(module)

below(importlib.import_module(sys.argv[1]))
print(json.dumps(sorted(sys.modules)))
"""


def imported_by(package: str, root: Path) -> list[str]:
    """Names of all modules in a fresh interpreter after importing `package` whole from `root`."""
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    finished = subprocess.run(
        [sys.executable, "-c", PROBE, package],
        cwd=root,
        env=environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return list(json.loads(finished.stdout))


def is_below(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in packages)


def climbed(wall: Wall, modules: list[str]) -> list[str]:
    """Modules beyond the wall. The parents of an allowed module come with it."""
    parents = {name.rpartition(".")[0] for name in wall.allowed}
    return [
        module
        for module in modules
        if is_below(module, wall.forbidden)
        and not is_below(module, wall.allowed)
        and module not in parents
    ]


@pytest.mark.parametrize("wall", WALLS, ids=lambda wall: wall.package)
def test_package_imports_nothing_beyond_its_walls(wall: Wall) -> None:
    modules = imported_by(wall.package, ROOT)
    below = [module for module in modules if module.startswith(wall.package + ".")]
    assert below, f"{wall.package} has no modules: the check would see nothing"
    assert climbed(wall, modules) == []


def test_every_package_of_the_repository_has_a_wall() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "bench"}
    assert packages <= {wall.package for wall in WALLS}


@pytest.mark.parametrize(
    "planted", ["import worker", "from lockstep import client", "from coordinator import engine"]
)
def test_a_planted_import_is_caught_however_deep_it_hides(tmp_path: Path, planted: str) -> None:
    for name in ("coordinator", "worker", "lockstep", "tpcomm"):
        (tmp_path / name / "deep").mkdir(parents=True)
        for module in ("__init__.py", "client.py", "engine.py", "deep/__init__.py"):
            (tmp_path / name / module).write_text("")
    (tmp_path / "tpcomm" / "deep" / "module.py").write_text(planted + "\n")
    wall = next(wall for wall in WALLS if wall.package == "tpcomm")
    beyond = planted.split()[1]
    assert beyond in climbed(wall, imported_by("tpcomm", tmp_path))


def test_a_shared_leaf_is_allowed_and_its_neighbour_is_not() -> None:
    wall = next(wall for wall in WALLS if wall.package == "worker")
    assert climbed(wall, ["worker", "lockstep", "lockstep.daemon", "lockstep.daemon.flags"]) == []
    assert climbed(wall, ["lockstep", "lockstep.daemons"]) == ["lockstep.daemons"]
