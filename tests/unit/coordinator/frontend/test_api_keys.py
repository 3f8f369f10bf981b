"""API keys from a file: who they are of, what is refused, and changes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from coordinator.frontend.api_keys import ApiKeys, ApiKeysError, read_api_keys
from lockstep import api_key


def line(tenant: str, key: str) -> str:
    return f"{tenant} sha256:{hashlib.sha256(key.encode()).hexdigest()}\n"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_key_names_its_tenant_and_every_other_key_nobody(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\n" + line("acme", "k1") + "  " + line("acme", "k2") + line("b", "k3"))
    keys = ApiKeys(path)
    assert [keys.tenant_of(key) for key in ("k1", "k2", "k3")] == ["acme", "acme", "b"]
    digest = hashlib.sha256(b"k1").hexdigest()
    for wrong in ("", "k", "k1 ", "K1", digest, f"sha256:{digest}", "k" * 100_000, "\udcff"):
        assert keys.tenant_of(wrong) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("acme secret-in-the-clear\n", "line 1: want"),
        (line("a", "k") + "b sha256:12\n", "line 2: want"),
        (line("a", "k") + line("b", "k"), "line 2: the key stands there twice"),
        (line("a" * 65, "k"), "line 1: the tenant is over 64"),
        ("# nothing\n", "no key"),
        ("sha256:" + "0" * 64 + "\n", "line 1: want"),
    ],
)
def test_a_bad_file_is_refused_without_showing_what_is_in_it(
    tmp_path: Path, content: str, words: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(ApiKeysError, match=words) as refused:
        read_api_keys(path)
    assert "secret-in-the-clear" not in str(refused.value)


def test_a_missing_file_and_one_that_is_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ApiKeysError, match="No such file"):
        read_api_keys(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ApiKeysError, match="not UTF-8"):
        read_api_keys(tmp_path / "binary")


def test_a_changed_file_counts_within_a_second_and_a_bad_one_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "keys", Clock()
    path.write_text(line("a", "old"))
    keys = ApiKeys(path, clock)
    path.write_text(line("a", "new") + line("b", "other"))
    assert keys.tenant_of("new") is None  # looked at a moment ago
    clock.now += 1.0
    assert keys.tenant_of("new") == "a"
    assert keys.tenant_of("old") is None
    path.write_text("half a li")
    clock.now += 1.0
    assert keys.tenant_of("new") == "a"
    assert "line 1" in caplog.text
    path.unlink()
    clock.now += 1.0
    assert keys.tenant_of("other") == "b"
    path.write_text(line("c", "last"))
    clock.now += 1.0
    assert keys.tenant_of("last") == "c"
    assert keys.tenant_of("new") is None


def test_the_command_makes_a_line_and_the_key_that_fits_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert api_key.main(["acme"]) == 0
    said = capsys.readouterr()
    key = said.err.split()[-1]
    assert key not in said.out
    (tmp_path / "keys").write_text(said.out)
    assert ApiKeys(tmp_path / "keys").tenant_of(key) == "acme"


@pytest.mark.parametrize("tenant", ["", "two words", "#comment", "t" * 65])
def test_the_command_refuses_a_tenant_that_the_file_could_not_name(tenant: str) -> None:
    with pytest.raises(SystemExit):
        api_key.main([tenant])
