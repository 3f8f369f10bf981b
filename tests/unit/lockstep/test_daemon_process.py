"""What a daemon finds in its environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.daemon_process import GRPC_EXPERIMENTS, daemon_environ


def test_daemons_get_no_settings_from_the_environment_and_find_this_package() -> None:
    environ = daemon_environ({"LOCKSTEP_PORT": "1", "HOME": "/h", "PYTHONPATH": "/elsewhere"})
    assert "LOCKSTEP_PORT" not in environ
    assert environ["HOME"] == "/h"
    folders = environ["PYTHONPATH"].split(os.pathsep)
    assert folders[-1] == "/elsewhere"
    assert (Path(folders[0]) / "lockstep" / "daemon_process.py").is_file()


def test_what_the_user_says_of_grpc_stands() -> None:
    environ = daemon_environ({"GRPC_EXPERIMENTS": "", "GRPC_VERBOSITY": "INFO"})
    assert (environ["GRPC_EXPERIMENTS"], environ["GRPC_VERBOSITY"]) == ("", "INFO")
    assert daemon_environ({})["GRPC_EXPERIMENTS"] == GRPC_EXPERIMENTS


@pytest.mark.parametrize("is_known", [True, False])
def test_the_installed_grpc_knows_the_event_loop_that_we_choose(is_known: bool) -> None:
    environ = daemon_environ(os.environ | {"GRPC_VERBOSITY": "ERROR"})
    environ["GRPC_EXPERIMENTS"] = GRPC_EXPERIMENTS if is_known else GRPC_EXPERIMENTS + "_"
    ran = subprocess.run(
        [sys.executable, "-c", "import grpc"], env=environ, capture_output=True, timeout=60
    )
    assert ran.returncode == 0
    assert (b"Unknown experiment" in ran.stderr) != is_known
