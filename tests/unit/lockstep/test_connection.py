"""The flags by which commands reach a server."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from lockstep.connection import Connection, add_connection_flags
from lockstep.errors import ConfigError


def connection(*words: str) -> Connection:
    parser = argparse.ArgumentParser()
    add_connection_flags(parser)
    return Connection.of_options(parser.parse_args(words))


def write(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


def test_without_flags_it_is_in_the_clear_to_this_host() -> None:
    assert connection() == Connection("127.0.0.1:50051")
    assert connection("--address", "h:1").address == "h:1"


def test_tls_is_of_the_system_or_of_a_file(tmp_path: Path) -> None:
    ca = write(tmp_path / "ca", "CA")
    assert connection("--tls").tls_ca == b""
    assert connection("--tls-ca", ca).tls_ca == b"CA"
    pair = [write(tmp_path / name, name) for name in ("cert", "key")]
    own = connection("--tls-cert", pair[0], "--tls-key", pair[1])
    assert (own.tls_ca, own.tls_cert, own.tls_key) == (b"", b"cert", b"key")


def test_a_key_is_read_without_its_newline_and_not_shown(tmp_path: Path) -> None:
    ours = connection("--api-key-file", write(tmp_path / "k", "lk-abc\n"))
    assert ours.api_key == "lk-abc"
    assert "lk-abc" not in repr(ours)
    for content in ("", "two words", "schlüssel"):
        with pytest.raises(ConfigError, match="one key and nothing else") as refused:
            connection("--api-key-file", write(tmp_path / "k", content))
        assert "words" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--tls-cert", "/none"], "go together"),
        (["--tls-key", "/none"], "go together"),
        (["--tls-ca", "/none/ca"], "--tls-ca /none/ca: No such file"),
        (["--api-key-file", "/none/key"], "--api-key-file /none/key: No such file"),
    ],
)
def test_flags_that_do_not_hold_are_refused_by_name(words: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        connection(*words)
