"""`lockstep chat` against a scripted server: over a pipe, and in a real terminal."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from lockstep import chat
from tests.helpers.scripted_server import TEXT, ScriptedServer, fails, hangs_after, serving

_ROOT = Path(__file__).resolve().parents[3]
_WAIT_S = 60.0
_NUM_PRESSES = 5
# Ctrl-C goes to the foreground group of the controlling terminal: this process is to be it.
_IN_TERMINAL = """
import fcntl, sys, termios
from lockstep.cli import main
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.exit(main())
"""


@pytest.fixture
def server() -> ScriptedServer:
    return ScriptedServer()


@pytest.fixture
def address(server: ScriptedServer) -> Iterator[str]:
    with serving(server) as address:
        yield address


def _turns(server: ScriptedServer, index: int = -1) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in server.requests[index].chat.messages]


def _pipe(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_pipe_gets_answers_alone_and_the_conversation_is_kept(
    server: ScriptedServer,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _pipe(monkeypatch, "hello", "", "and now?")
    assert chat.main(["--address", address, "--system", "be kind", "--max-tokens", "9"]) == 0
    assert _turns(server) == [
        ("system", "be kind"),
        ("user", "hello"),
        ("assistant", TEXT),
        ("user", "and now?"),
    ]
    assert server.requests[-1].sampling_params.max_tokens == 9
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (f"{TEXT}\n{TEXT}\n", "")


def test_reset_and_system_begin_anew(
    server: ScriptedServer, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["a", "/reset", "b", "/system be brief", "c", "/system", "d", "/quit", "e"]
    _pipe(monkeypatch, *lines)
    assert chat.main(["--address", address, "--system", "be kind"]) == 0
    assert [_turns(server, index) for index in range(4)] == [
        [("system", "be kind"), ("user", "a")],
        [("system", "be kind"), ("user", "b")],
        [("system", "be brief"), ("user", "c")],
        [("user", "d")],
    ]
    assert len(server.requests) == 4


def test_a_pipe_ends_with_the_first_failure(
    server: ScriptedServer,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.plant(fails(grpc.StatusCode.UNAVAILABLE, "not ready"))
    _pipe(monkeypatch, "hello", "again")
    assert chat.main(["--address", address]) == 1
    assert capsys.readouterr().err == "lockstep chat: UNAVAILABLE: not ready\n"
    _pipe(monkeypatch, "/what", "again")
    assert chat.main(["--address", address]) == 2
    assert "no command '/what'" in capsys.readouterr().err
    assert len(server.requests) == 1


def test_speed_is_told_when_asked(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _pipe(monkeypatch, "hello")
    assert chat.main(["--address", address, "--verbose"]) == 0
    said = capsys.readouterr().err
    assert re.fullmatch(r"\(3 tokens in \d+\.\d\d s, \d+\.\d tokens/s\)\n", said)


class _Terminal:
    """`lockstep chat` in a pseudo-terminal of its own."""

    def __init__(self, address: str) -> None:
        self._fd, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _IN_TERMINAL, "chat", "--address", address],
            cwd=_ROOT,
            env={**os.environ, "TERM": "dumb"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._shown = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, text: str) -> str:
        """What was shown up to and including `text`."""
        assert self._is_shown(text, _WAIT_S), f"no {text!r} in {self._shown!r}"
        before, found, self._shown = self._shown.partition(text)
        return before + found

    def interrupt(self, until_shown: str) -> None:
        """Ctrl-C at the prompt, again if it came between the prompt and the wait for a key.

        readline notes such a signal and acts on it with the next: two count as one then.
        """
        for _ in range(_NUM_PRESSES):
            self.type("\x03")
            if self._is_shown(until_shown, _WAIT_S / _NUM_PRESSES):
                break
        self.wait_for(until_shown)

    def _is_shown(self, text: str, limit_s: float) -> bool:
        deadline = time.monotonic() + limit_s
        while text not in self._shown:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            if select.select([self._fd], [], [], left_s)[0]:
                self._shown += os.read(self._fd, 4096).decode()
        return True

    def close(self) -> None:
        self.process.kill()
        self.process.wait(_WAIT_S)
        os.close(self._fd)


def test_ctrl_c_ends_the_answer_and_not_the_chat(server: ScriptedServer, address: str) -> None:
    server.plant(hangs_after(1), fails(grpc.StatusCode.UNAVAILABLE, "not ready"))
    with contextlib.closing(_Terminal(address)) as terminal:
        terminal.wait_for("> ")
        terminal.type("wait\n")
        terminal.wait_for("Hi ")
        terminal.type("\x03")
        assert server.cancelled.wait(_WAIT_S)
        terminal.wait_for("> ")
        terminal.type("fail\n")
        terminal.wait_for("UNAVAILABLE: not ready")
        terminal.wait_for("> ")
        terminal.type("hello\n")
        assert TEXT in terminal.wait_for("tokens/s)")
        # Neither the answer that was ended nor the one that failed is part of the conversation.
        assert _turns(server) == [("user", "hello")]
        terminal.wait_for("> ")
        terminal.interrupt(until_shown="ends the chat)")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(_WAIT_S) == 0


def test_ctrl_c_twice_at_the_prompt_ends_the_chat(address: str) -> None:
    with contextlib.closing(_Terminal(address)) as terminal:
        terminal.wait_for("> ")
        terminal.interrupt(until_shown="ends the chat)")
        terminal.wait_for("> ")
        terminal.interrupt(until_shown="(ended)")
        assert terminal.process.wait(_WAIT_S) == 130
