"""Ready file, cache folder, digest and death signal behave as the daemons rely on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.daemon.cache_dir import cache_dir
from lockstep.daemon.model_digest import ModelDirError, model_digest
from lockstep.daemon.ready_file import write_ready_file


def test_ready_file_is_whole_and_leaves_no_partial(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    write_ready_file(path, role="worker", rank=1, grpc="127.0.0.1:5", metrics="127.0.0.1:6")
    assert json.loads(path.read_text())["pid"] == os.getpid()
    assert [entry.name for entry in tmp_path.iterdir()] == ["ready.json"]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"XDG_CACHE_HOME": "/x y", "HOME": "/h"}, "/x y/lockstep"),
        ({"HOME": "/h"}, "/h/.cache/lockstep"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/lockstep"),
    ],
)
def test_cache_dir_follows_xdg_then_home(environ: dict[str, str], expected: str) -> None:
    assert cache_dir(environ) == Path(expected)


def test_cache_dir_without_home_is_a_temporary_folder_of_this_user() -> None:
    assert cache_dir({}).name == f"lockstep-{os.getuid()}"


def test_model_digest_changes_with_config_and_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    without_weights = model_digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + b"payload")
    with_weights = model_digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + b"other")
    assert model_digest(tmp_path) == with_weights != without_weights
    (tmp_path / "config.json").write_text("{ }")
    assert model_digest(tmp_path) != with_weights


def test_folder_without_config_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelDirError, match=str(tmp_path)):
        model_digest(tmp_path)


_CHILD = """
import os, sys, time
from lockstep.daemon.parent_death import die_with_parent
die_with_parent(int(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(60)
"""

_PARENT = f"""
import os, subprocess, sys
command = [sys.executable, "-c", {_CHILD!r}, str(os.getpid())]
child = subprocess.Popen(command, stdout=subprocess.PIPE)
print(child.stdout.readline().decode().strip(), flush=True)
os.kill(os.getpid(), 9)
"""


def test_child_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.run(
        [sys.executable, "-c", _PARENT], capture_output=True, timeout=30, check=False
    )
    pid = int(parent.stdout)
    descriptor = None
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    import select

    try:
        assert select.select([descriptor], [], [], 10)[0], f"child {pid} outlived its parent"
    finally:
        os.close(descriptor)
