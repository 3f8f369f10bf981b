"""`make setup`: which torch it chooses and why, and that it is done once and resumes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU_URL = "https://host/torch-2.13.0%2Bcpu-cp311-cp311-linux_x86_64.whl"
CUDA_URL = "https://host/torch-2.13.0-cp311-cp311-linux_x86_64.whl"


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    """scripts/setup.py as a module; it is no package, since it runs before there is one."""
    spec = importlib.util.spec_from_file_location("lockstep_setup", ROOT / "scripts/setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ("echo 'NVIDIA H100'; echo 'NVIDIA H100'", "cuda"),
        ("echo 'No devices were found' >&2; exit 6", "cpu"),
        ("exit 0", "cpu"),
    ],
)
def test_a_gpu_that_answers_decides_the_build(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, kind: str
) -> None:
    executable(tmp_path / "nvidia-smi", script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    chosen, reason = setup.choose_kind({})
    assert chosen == kind
    assert ("2x NVIDIA H100" in reason) == (kind == "cuda")


def test_torch_variable_overrides_the_choice(setup: ModuleType) -> None:
    assert setup.choose_kind({"TORCH": "cuda"})[0] == "cuda"
    assert setup.choose_kind({"TORCH": "cpu"})[0] == "cpu"
    with pytest.raises(SystemExit, match="TORCH=rocm"):
        setup.choose_kind({"TORCH": "rocm"})


@pytest.mark.parametrize(
    ("by_default", "on_cpu_index", "options", "words"),
    [
        (CPU_URL, "", (), "found on pip's index"),
        (CPU_URL.replace("https://", "file:///"), "", (), "found on this machine's disk"),
        (CUDA_URL, CPU_URL, ("--index-url",), "found on https://download.pytorch.org"),
        ("", CPU_URL, ("--index-url",), "found on https://download.pytorch.org"),
        (CUDA_URL, "", (), "so the CUDA build, which runs on CPUs as well"),
        ("installed", "", (), "already installed"),
    ],
)
def test_a_cpu_build_is_preferred_wherever_one_is_found(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    by_default: str,
    on_cpu_index: str,
    options: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.setattr(
        setup, "offered", lambda requirement, *given: on_cpu_index if given else by_default
    )
    plan = setup.make_plan("cpu", "no GPU", ROOT / "constraints" / "cpu.txt")
    assert words in plan.reason
    assert plan.pip_options[: len(options)] == options
    assert bool(plan.pip_options) == bool(options)
    is_cuda_build = by_default == CUDA_URL and not on_cpu_index
    assert ("GB" in plan.download) == is_cuda_build


def test_readme_and_constraints_name_the_download_that_setup_announces(setup: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for kind, size in (("cpu", setup._SIZE_CPU), ("cuda", setup._SIZE_CUDA)):
        assert f"({size.removeprefix('about ')})" in readme
        assert f"Download {size}" in (ROOT / "constraints" / f"{kind}.txt").read_text()


def test_no_torch_anywhere_is_an_error_that_names_both_places(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "offered", lambda requirement, *given: "")
    with pytest.raises(setup.SetupError, match=r"pip's index nor https://download\.pytorch\.org"):
        setup.make_plan("cpu", "no GPU", ROOT / "constraints" / "cpu.txt")


def test_the_stamp_changes_with_what_is_installed(setup: ModuleType, tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("torch==1\n")
    second.write_text("torch==2\n")
    assert setup.fingerprint(first) != setup.fingerprint(second)
    assert setup.pinned(second, "torch") == "2"
    with pytest.raises(setup.SetupError, match="does not pin numpy"):
        setup.pinned(second, "numpy")


def test_setup_is_done_once_and_goes_on_after_a_failure(
    setup: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs: list[tuple[str, ...]] = []
    broken = True

    def run_pip(*arguments: str) -> None:
        runs.append(arguments)
        if broken and "--editable" in arguments:
            raise setup.SetupError("planted")

    monkeypatch.setattr(setup, "run_pip", run_pip)
    monkeypatch.setattr(setup, "offered", lambda requirement, *given: CPU_URL)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert setup.main({"TORCH": "cpu"}) == 1
    assert "error: planted" in capsys.readouterr().err
    broken = False
    assert setup.main({"TORCH": "cpu"}) == 0
    done = len(runs)
    assert setup.main({"TORCH": "cpu"}) == 0
    assert len(runs) == done, "nothing is installed twice"


def run_setup_script(folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    (folder / "scripts").mkdir(exist_ok=True)
    (folder / "scripts/setup.sh").write_text((ROOT / "scripts/setup.sh").read_text())
    return subprocess.run(
        ["/bin/bash", "scripts/setup.sh"],
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_without_a_python_the_package_to_install_is_named(tmp_path: Path) -> None:
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        executable(tmp_path / "bin" / name, "exit 1")
    os.symlink("/usr/bin/dirname", tmp_path / "bin" / "dirname")
    finished = run_setup_script(tmp_path, PATH=str(tmp_path / "bin"))
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: no Python 3.11 to 3.13 found: ")
    assert "install" in finished.stderr or "glibc" in finished.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_python_without_venv_names_the_package_that_has_it(tmp_path: Path) -> None:
    # Debian's python3 comes without ensurepip.
    executable(tmp_path / "bin" / "python3", 'case "$2" in *ensurepip*) exit 1;; esac')
    for name in ("python3.11", "python3.12", "python3.13"):
        executable(tmp_path / "bin" / name, "exit 1")
    os.symlink("/usr/bin/dirname", tmp_path / "bin" / "dirname")
    finished = run_setup_script(tmp_path, PATH=str(tmp_path / "bin"))
    assert finished.returncode == 1
    assert "error: python3 lacks venv: install the package python3-venv" in finished.stderr


def test_a_wrong_python_variable_is_refused_not_replaced(tmp_path: Path) -> None:
    finished = run_setup_script(tmp_path, PATH=os.environ["PATH"], PYTHON="/nowhere/python")
    assert finished.returncode == 1
    assert "error: PYTHON=/nowhere/python is not a Python 3.11 to 3.13" in finished.stderr
