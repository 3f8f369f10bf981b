"""The `lockstep` command."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.cli import main
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.version import __version__
from lockstep.table import format_table

_ROOT = Path(__file__).parents[3]


def _run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lockstep", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == ExitCode.CLEAN
    assert capsys.readouterr().out == f"lockstep {__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == ExitCode.CLEAN
    shown = capsys.readouterr().out
    names = ("serve", "coordinator", "worker", "generate", "chat", "demo", "doctor", "bench")
    assert all(f"  {name} " in shown for name in names)


def test_unknown_command_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["surf"]) == ExitCode.CONFIG
    assert "'surf'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1,x", "", "1;2"])
def test_token_ids_that_are_none_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", f"--token-ids={text}"])
    assert ended.value.code == ExitCode.CONFIG
    assert f"{text!r} is not a list of ids like 1,2,3" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_named_on_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert main(["generate", "--address", address, "--prompt", "Hello"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert address in said and "`lockstep serve`" in said


def test_a_host_without_an_address_is_named_with_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # .invalid never resolves (RFC 6761).
    assert main(["generate", "--address", "host.invalid:1", "--prompt", "Hello"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "host.invalid" in said and "`lockstep serve`" in said


@pytest.mark.parametrize("words", [["--help"], ["bench", "--help"]])
def test_a_reader_that_leaves_ends_a_command_without_a_word(words: list[str]) -> None:
    command = [sys.executable, "-m", "lockstep", *words]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        result = subprocess.run(
            command, cwd=_ROOT, stdout=output, stderr=subprocess.PIPE, timeout=100, check=False
        )
    assert (result.returncode, result.stderr) == (141, b"")


def test_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == ExitCode.CLEAN
    assert "serving" in capsys.readouterr().out
    assert main(["bench", "speed"]) == ExitCode.CONFIG
    assert "'speed'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "generate", "chat", "demo"])
def test_commands_explain_themselves(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"lockstep {command}" in capsys.readouterr().out


@pytest.mark.parametrize("daemon", ["worker", "coordinator"])
def test_daemon_commands_become_the_daemon(daemon: str, tmp_path: Path) -> None:
    # A folder of the daemon's name where the user stands must not be taken for it.
    (tmp_path / daemon).mkdir()
    (tmp_path / daemon / "__main__.py").write_text("print('not the daemon')")
    result = _run(daemon, "--colour", "red", cwd=tmp_path)
    assert result.returncode == ExitCode.CONFIG
    assert "--colour" in result.stderr
    assert "not the daemon" not in result.stdout


def test_table_columns_are_aligned() -> None:
    table = format_table(("rank", "pid"), [(0, 12345), (1, 7)])
    assert table.splitlines() == ["rank |   pid", "-----+------", "   0 | 12345", "   1 |     7"]
