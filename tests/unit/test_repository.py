"""Rules of the house that no linter knows, over the files of the repository."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator import config as coordinator_config
from lockstep import __version__, serve
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.flags import help_text
from lockstep.daemon.version import __version__ as daemon_version

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("protos", "tpcomm", "worker", "coordinator", "lockstep", "bench")
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 70  # docstring not counted; kernels, which cannot be cut, excepted
VAGUE_NAMES = {"utils", "util", "helpers", "common", "misc", "manager"}
TARGETS = (
    *("help", "setup", "demo", "serve", "test", "test-gpu", "test-apt", "test-http", "soak"),
    *("lint", "type", "protos", "protos-check", "bench", "bench-record", "clean"),
)


def sources(root: Path = ROOT) -> list[Path]:
    """Hand-written modules of the packages."""
    found = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    return [path for path in found if not re.search(r"_pb2(_grpc)?$", path.stem)]


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins(kind: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / f"{kind}.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in found), f"constraints/{kind}.txt pins with == only"
    return {name: version for name, version in found}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def num_code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if is_docstring else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring


def oversized(path: Path) -> Iterator[str]:
    text = path.read_text()
    if text.count("\n") > MAX_FILE_LINES:
        yield f"{path}: {text.count(chr(10))} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_kernel(node):
            continue
        if num_code_lines(node) > MAX_FUNCTION_LINES:
            yield f"{path}: {node.name} has {num_code_lines(node)} lines of code"


def test_files_and_functions_stay_readable() -> None:
    assert [finding for path in sources() for finding in oversized(path)] == []


def test_an_oversized_function_and_file_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    path.write_text("def long() -> None:\n" + "    print()\n" * MAX_FILE_LINES)
    assert len(list(oversized(path))) == 2
    path.write_text("@triton.jit\ndef long() -> None:\n" + "    print()\n" * 100)
    assert list(oversized(path)) == []


def test_no_module_has_a_vague_name() -> None:
    assert [str(path) for path in sources() if path.stem in VAGUE_NAMES] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_that_it_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_one_version_everywhere() -> None:
    assert pyproject()["project"]["version"] == __version__ == daemon_version
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_constraints_pin_every_direct_dependency(kind: str) -> None:
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["demo"], *extras["test"], *extras["dev"]]
    wanted += [*extras["http"], *extras["http-test"]]
    names = {normal(re.split(r"[<>=!\[]", item)[0]) for item in wanted} - {"lockstep"}
    assert names <= {normal(name) for name in pins(kind)}


def test_both_constraints_agree_but_for_torch_and_what_it_brings() -> None:
    cpu, cuda = pins("cpu"), pins("cuda")
    # torch 2.11 needs an older setuptools; it is there for a build that has its CUDA.
    allowed = {"torch", "setuptools"}
    assert {name for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]} <= allowed
    extra = {name for name in cuda if name not in cpu}
    assert all(name.startswith(("nvidia-", "cuda-")) or name == "triton" for name in extra)


def test_no_pin_is_a_withdrawn_release() -> None:
    assert pins("cpu")["pytest-timeout"] != "2.5.0"


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert [line.split()[1] for line in shown.splitlines()] == list(TARGETS)


@pytest.mark.parametrize("target", [t for t in TARGETS if t not in ("help", "clean", "setup")])
def test_without_setup_every_target_runs_with_the_given_python(target: str) -> None:
    planned = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", target, "SETUP=0", "PYTHON=/some/python"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert "/some/python" in planned
    assert ".venv" not in planned
    assert "setup.sh" not in planned


@pytest.mark.parametrize("prompt", ['say "hi"', "it's $HOME & `id`; $(id)", "two\nlines", "-h"])
def test_a_prompt_reaches_the_demo_as_it_was_typed(tmp_path: Path, prompt: str) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nshift 2\nprintf '%s|' \"$@\"\n")
    python.chmod(0o755)
    shown = subprocess.run(
        ["make", "--no-print-directory", "demo", "SETUP=0", f"PYTHON={python}", f"PROMPT={prompt}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert shown == f"demo|--prompt={prompt}|"


def test_readme_begins_with_the_two_commands() -> None:
    first_screen = (ROOT / "README.md").read_text().splitlines()[:30]
    assert any("make demo" in line for line in first_screen)
    assert any("make test" in line for line in first_screen)


def test_readme_lists_every_flag_and_no_other() -> None:
    modules = ("coordinator/config.py", "worker/config.py", "lockstep/serve.py")
    shared = "lockstep/daemon/security_flags.py"
    text = "".join((ROOT / module).read_text() for module in (*modules, shared))
    flags = set(re.findall(r'\bFlag\(\s*"([a-z-]+)"', text))
    table = re.search(r"^## Flags\n(.*?)^## ", (ROOT / "README.md").read_text(), re.S | re.M)
    assert table is not None
    rows = [line.split("|")[1] for line in table[1].splitlines() if line.startswith("| `--")]
    assert {flag for row in rows for flag in re.findall(r"--([a-z-]+)", row)} == flags


def _default_shown(text: str) -> str:
    shown = re.search(r"\(default: (.*)\)$", text)
    return shown[1] if shown else ""


def test_serve_shows_the_defaults_of_the_coordinator_whose_flags_it_passes_on() -> None:
    owned = {flag.name: help_text(flag) for flag in coordinator_config.FLAGS}
    for flag in serve.COORDINATOR_FLAGS:
        default = _default_shown(owned[flag.name])
        # 0 stands for a rule there, which serve spells out.
        assert _default_shown(help_text(flag)) == ("" if default == "0" else default), flag.name


def test_readme_lists_every_exit_code() -> None:
    text = (ROOT / "README.md").read_text()
    for code in ExitCode:
        assert re.search(rf"^\| {code.value} \| ", text, re.M), code


def test_generated_code_runs_on_the_oldest_runtime_that_is_allowed() -> None:
    floor = next(
        item for item in pyproject()["project"]["dependencies"] if item.startswith("protobuf")
    )
    versions = {
        re.search(r"^# Protobuf Python Version: (\S+)$", path.read_text(), re.MULTILINE)
        for path in (ROOT / "protos").rglob("*_pb2.py")
    }
    assert {match[1] if match else None for match in versions} == {
        re.split(r"[=,]+", floor)[1].strip()
    }


def test_version_is_printed_by_the_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "lockstep", "--version"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert __version__ in shown
