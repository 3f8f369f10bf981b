"""Certificates are checked when they are read, in words that name the file."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lockstep.daemon.tls_files import ReloadedTls, TlsFileError, TlsFiles, read_tls_files
from tests.helpers.certificates import Authority, Pair

DAY = datetime.timedelta(days=1)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.mark.parametrize("usage", ["", "server"])
def test_a_good_server_certificate_is_read_whole(authority: Authority, usage: str) -> None:
    pair = authority.issue(f"good{usage}", usage=usage)
    material = read_tls_files(TlsFiles(pair.cert, pair.key, authority.cert), is_server=True)
    assert material.cert == pair.cert.read_bytes()
    assert material.key == pair.key.read_bytes()
    assert material.ca == authority.cert.read_bytes()


def test_a_client_certificate_is_good_for_a_client_and_for_no_server(authority: Authority) -> None:
    pair = authority.issue("client-only", usage="client")
    files = TlsFiles(pair.cert, pair.key)
    assert read_tls_files(files, is_server=False).ca is None
    with pytest.raises(TlsFileError, match=r"client-only\.pem.*purpose"):
        read_tls_files(files, is_server=True)


def missing(authority: Authority, folder: Path) -> TlsFiles:
    return TlsFiles(folder / "none.pem", authority.issue("a").key)


def missing_key(authority: Authority, folder: Path) -> TlsFiles:
    return TlsFiles(authority.issue("b").cert, folder / "none.key")


def unreadable(authority: Authority, folder: Path) -> TlsFiles:
    return TlsFiles(folder, authority.issue("c").key)


def garbage(authority: Authority, folder: Path) -> TlsFiles:
    (folder / "garbage.pem").write_bytes(b"\x00\xff not a certificate")
    return TlsFiles(folder / "garbage.pem", authority.issue("d").key)


def swapped(authority: Authority, folder: Path) -> TlsFiles:
    pair = authority.issue("swapped")
    return TlsFiles(pair.key, pair.cert)


def cut_short(authority: Authority, folder: Path) -> TlsFiles:
    pair = authority.issue("cut")
    pair.cert.write_bytes(pair.cert.read_bytes()[:200])
    return TlsFiles(pair.cert, pair.key)


def of_two_pairs(authority: Authority, folder: Path) -> TlsFiles:
    return TlsFiles(authority.issue("one").cert, authority.issue("two").key)


def expired(authority: Authority, folder: Path) -> TlsFiles:
    pair = authority.issue("expired", starts_in=-2 * DAY, ends_in=-DAY)
    return TlsFiles(pair.cert, pair.key)


def not_yet(authority: Authority, folder: Path) -> TlsFiles:
    pair = authority.issue("early", starts_in=DAY, ends_in=2 * DAY)
    return TlsFiles(pair.cert, pair.key)


def ca_missing(authority: Authority, folder: Path) -> TlsFiles:
    pair = authority.issue("e")
    return TlsFiles(pair.cert, pair.key, folder / "no-ca.pem")


def ca_garbage(authority: Authority, folder: Path) -> TlsFiles:
    pair = authority.issue("f")
    (folder / "bad-ca.pem").write_text("nothing")
    return TlsFiles(pair.cert, pair.key, folder / "bad-ca.pem")


def of_another_group(authority: Authority, folder: Path) -> TlsFiles:
    pair = Authority(folder, "other").issue("stranger")
    return TlsFiles(pair.cert, pair.key, authority.cert, issuer_ca=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (missing, r"none\.pem: No such file"),
        (missing_key, r"none\.key: No such file"),
        (unreadable, "Is a directory"),
        (garbage, r"garbage\.pem: no PEM certificate"),
        (swapped, r"swapped\.key: no PEM certificate"),
        (cut_short, r"cut\.pem"),
        (of_two_pairs, r"two\.key is not the private key of .*one\.pem"),
        (expired, r"expired\.pem: certificate has expired"),
        (not_yet, r"early\.pem: certificate is not yet valid"),
        (ca_missing, r"no-ca\.pem: No such file"),
        (ca_garbage, r"bad-ca\.pem: no PEM certificates"),
        (of_another_group, r"stranger\.pem: unable to get local issuer certificate"),
    ],
)
@pytest.mark.parametrize("is_server", [True, False])
def test_a_bad_file_is_refused_by_name_in_one_line(
    authority: Authority,
    tmp_path: Path,
    make: Callable[[Authority, Path], TlsFiles],
    words: str,
    is_server: bool,
) -> None:
    with pytest.raises(TlsFileError, match=words) as refused:
        read_tls_files(make(authority, tmp_path), is_server)
    assert "\n" not in str(refused.value)


def test_a_member_of_the_group_is_taken(authority: Authority) -> None:
    pair = authority.issue("member")
    files = TlsFiles(pair.cert, pair.key, authority.cert, issuer_ca=True)
    for is_server in (True, False):
        assert read_tls_files(files, is_server).ca == authority.cert.read_bytes()


def test_changed_files_are_taken_once_and_bad_ones_never(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    used = Authority(tmp_path).issue("used")
    tls = ReloadedTls(TlsFiles(used.cert, used.key), is_server=True)
    assert tls.changed() is None

    def replace_by(pair: Pair) -> None:
        pair.move_to(used)

    replace_by(authority.issue("next"))
    wanted = used.cert.read_bytes()
    material = tls.changed()
    assert material is not None and material.cert == wanted
    assert tls.changed() is None

    replace_by(authority.issue("old", starts_in=-2 * DAY, ends_in=-DAY))
    assert tls.changed() is None
    assert "certificate has expired" in caplog.text
    used.cert.unlink()
    assert tls.changed() is None
    replace_by(authority.issue("mended"))
    assert tls.changed() is not None


def test_a_secret_mounted_by_a_link_that_moves_is_noticed(
    authority: Authority, tmp_path: Path
) -> None:
    """As Kubernetes updates a Secret: a link to a new folder is renamed over the old one."""
    for version in ("v1", "v2"):
        pair = authority.issue(f"mounted-{version}")
        (tmp_path / version).mkdir()
        pair.move_to(Pair(tmp_path / version / "tls.crt", tmp_path / version / "tls.key"))
    (tmp_path / "data").symlink_to("v1")
    files = TlsFiles(tmp_path / "data" / "tls.crt", tmp_path / "data" / "tls.key")
    tls = ReloadedTls(files, is_server=True)
    (tmp_path / "data.new").symlink_to("v2")
    os.rename(tmp_path / "data.new", tmp_path / "data")
    material = tls.changed()
    assert material is not None
    assert material.cert == (tmp_path / "v2" / "tls.crt").read_bytes()
