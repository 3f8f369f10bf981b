"""What is refused before anything is served, and the group's tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.daemon.flags import FlagError
from lockstep.daemon.group_secret import (
    hold_new_secret,
    join_token,
    read_group_secret,
    token_epoch,
)
from lockstep.daemon.security_flags import check_exposure, group_tls, is_loopback, public_tls

SECRET = b"0123456789abcdef"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_the_loopback_needs_no_guard(host: str) -> None:
    assert is_loopback(host)
    check_exposure(host, False, False, "")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "192.0.2.1", "example.org", ""])
def test_an_address_beyond_the_loopback_needs_tls_or_a_word(host: str) -> None:
    with pytest.raises(FlagError, match=r"--host is .*give it, or say --allow-plaintext on"):
        check_exposure(host, False, False, "give it")
    check_exposure(host, True, False, "")
    check_exposure(host, False, True, "")


@pytest.mark.parametrize("given", [("c", "", ""), ("", "k", ""), ("", "", "ca")])
def test_files_that_go_together_are_given_together(given: tuple[str, str, str]) -> None:
    with pytest.raises(FlagError, match="together|needs"):
        public_tls(*given)
    with pytest.raises(FlagError, match="together"):
        group_tls(*given)


def test_no_files_are_no_tls() -> None:
    assert public_tls("", "", "") is None
    assert group_tls("", "", "") is None


def test_a_token_tells_its_epoch_to_who_knows_the_secret() -> None:
    token = join_token(SECRET, 1234567890123)
    assert token_epoch(SECRET, token) == 1234567890123
    assert token_epoch(b"another secret...", token) is None
    _, _, code = token.partition(".")
    for forged in (
        *("", ".", "1", f"1234567890124.{code}", f"{code}.1234567890123", token[:-1]),
        *(f"+{token}", f" {token}", f"{token} ", "1.\xff", "9" * 5000 + f".{code}", f"١.{code}"),
    ):
        assert token_epoch(SECRET, forged) is None, forged


def test_a_secret_is_read_without_its_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(SECRET + b"\n")
    assert read_group_secret(str(path)) == SECRET
    assert read_group_secret("") is None


def test_a_secret_that_is_missing_or_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="--group-secret .*No such file"):
        read_group_secret(str(tmp_path / "none"))
    (tmp_path / "short").write_bytes(b"short\n")
    with pytest.raises(FlagError, match="holds 5 bytes"):
        read_group_secret(str(tmp_path / "short"))


def test_a_held_secret_is_new_each_time_and_can_be_read_again() -> None:
    one, two = hold_new_secret(), hold_new_secret()
    assert read_group_secret(one) == read_group_secret(one) != read_group_secret(two)
