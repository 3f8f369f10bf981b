"""TLS and mutual TLS of both clients against a server that demands it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from lockstep.client import (
    ClientConfig,
    ConfigError,
    GenerateRequest,
    RetryPolicy,
    Tls,
    Unavailable,
)
from tests.helpers.certificates import Authority, Pair
from tests.helpers.client_runs import KINDS, unary
from tests.helpers.scripted_server import TEXT, ScriptedServer, serving

both = pytest.mark.parametrize("kind", KINDS)


@dataclass(frozen=True)
class _Certificates:
    ours: Authority
    theirs: Authority
    server: Pair
    client: Pair
    stranger: Pair

    def credentials(self, wants_client: bool) -> Any:
        pair = (self.server.key.read_bytes(), self.server.cert.read_bytes())
        ca = self.ours.cert.read_bytes() if wants_client else None
        return grpc.ssl_server_credentials([pair], ca, wants_client)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> _Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    ours, theirs = Authority(folder / "ours"), Authority(folder / "theirs")
    return _Certificates(
        ours=ours,
        theirs=theirs,
        server=ours.issue("server"),
        client=ours.issue("client"),
        stranger=theirs.issue("stranger"),
    )


def _ask(kind: str, address: str, tls: Tls | None) -> str:
    config = ClientConfig(tls=tls, api_key="key", timeout_s=10.0, retry=RetryPolicy(max_attempts=1))
    return unary(kind, address, GenerateRequest("x"), config).text


@both
def test_a_server_of_the_given_ca_is_trusted_by_its_name_or_the_one_given(
    kind: str, certificates: _Certificates
) -> None:
    server = ScriptedServer()
    with serving(server, credentials=certificates.credentials(False)) as address:
        ca = certificates.ours.cert
        assert _ask(kind, address, Tls(ca=ca)) == TEXT
        assert _ask(kind, address, Tls(ca=ca, server_name="localhost")) == TEXT
        assert server.metadata[0]["authorization"] == "Bearer key"
        for wrong in (
            Tls(ca=certificates.theirs.cert),
            Tls(ca=ca, server_name="another.example"),
            Tls(),
            None,
        ):
            with pytest.raises(Unavailable):
                _ask(kind, address, wrong)
    assert len(server.requests) == 2


@both
def test_a_server_that_asks_for_a_certificate_gets_ours(
    kind: str, certificates: _Certificates
) -> None:
    server = ScriptedServer()
    ca, ours, strange = certificates.ours.cert, certificates.client, certificates.stranger
    with serving(server, credentials=certificates.credentials(True)) as address:
        assert _ask(kind, address, Tls(ca=ca, cert=ours.cert, key=ours.key)) == TEXT
        for wrong in (Tls(ca=ca), Tls(ca=ca, cert=strange.cert, key=strange.key)):
            with pytest.raises(Unavailable):
                _ask(kind, address, wrong)
    assert len(server.requests) == 1


def test_files_that_are_missing_or_incomplete_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*no\.pem: No such file"):
        _ask("sync", "127.0.0.1:1", Tls(ca=tmp_path / "no.pem"))
    with pytest.raises(ConfigError, match="key is given without cert"):
        Tls(key=tmp_path / "key.pem")
