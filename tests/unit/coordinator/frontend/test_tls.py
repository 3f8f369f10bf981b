"""The public port with TLS: whose handshake is refused, and certificates that change."""

import asyncio
import datetime
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.frontend.frontend import PublicAccess
from lockstep.daemon.tls_files import TlsFileError
from protos.lockstep.v1 import generate_pb2, generate_pb2_grpc
from tests.helpers.certificates import Authority, Pair
from tests.unit.coordinator.frontend.fake_engine import (
    frontend_config,
    open_channel,
    serving,
    within,
    write_ids_only_model,
)

DAY = datetime.timedelta(days=1)
INFO = generate_pb2.GetModelInfoRequest()


def credentials(ca: Authority, pair: Pair | None = None) -> grpc.ChannelCredentials:
    key, cert = (None, None) if pair is None else (pair.key.read_bytes(), pair.cert.read_bytes())
    return grpc.ssl_channel_credentials(ca.cert.read_bytes(), key, cert)


async def ask(port: int, shown: grpc.ChannelCredentials | None, host: str = "127.0.0.1") -> str:
    """ "ok", or why the call did not come through."""
    async with open_channel(f"{host}:{port}", shown) as channel:
        try:
            await within(generate_pb2_grpc.GenerateServiceStub(channel).GetModelInfo(INFO))
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error
            return error.details() or "no details"
    return "ok"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def test_clients_that_trust_our_ca_are_served_and_no_others(
    authority: Authority, tmp_path: Path
) -> None:
    async def main() -> None:
        pair = authority.issue("server", usage="server")
        files: dict[str, Any] = {"tls_cert": str(pair.cert), "tls_key": str(pair.key)}
        known = credentials(authority)
        model = write_ids_only_model(tmp_path / "model")
        async with serving(model, credentials=known, **files) as served:
            port = served.engine.port
            assert await ask(port, known) == "ok"
            assert await ask(port, known, "localhost") == "ok"
            stranger = credentials(Authority(tmp_path, "another-ca"))
            assert "CERTIFICATE_VERIFY_FAILED" in await ask(port, stranger)
            assert await ask(port, None) != "ok"  # in the clear
            assert await ask(port, known) == "ok"

    asyncio.run(main())


def test_clients_must_show_a_good_certificate_where_that_is_asked(
    authority: Authority, tmp_path: Path
) -> None:
    async def main() -> None:
        pair = authority.issue("mutual", usage="server")
        clients = Authority(tmp_path, "clients")
        good = credentials(authority, clients.issue("good", usage="client"))
        files: dict[str, Any] = {"tls_cert": str(pair.cert), "tls_key": str(pair.key)}
        files["tls_client_ca"] = str(clients.cert)
        refused = {
            "missing": credentials(authority),
            "of the wrong CA": credentials(authority, authority.issue("wrong-ca")),
            "expired": credentials(
                authority, clients.issue("old", starts_in=-2 * DAY, ends_in=-DAY)
            ),
            "not valid yet": credentials(
                authority, clients.issue("early", starts_in=DAY, ends_in=2 * DAY)
            ),
            "for servers": credentials(authority, clients.issue("purpose", usage="server")),
        }
        model = write_ids_only_model(tmp_path / "model")
        async with serving(model, credentials=good, **files) as served:
            for what, shown in refused.items():
                assert await ask(served.engine.port, shown) != "ok", what
                assert await ask(served.engine.port, good) == "ok"

    asyncio.run(main())


async def subject(port: int, ca: Authority) -> str:
    """Common name of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=str(ca.cert))
    context.set_alpn_protocols(["h2"])
    _, writer = await within(asyncio.open_connection("127.0.0.1", port, ssl=context))
    name = dict(entry[0] for entry in writer.get_extra_info("peercert")["subject"])["commonName"]
    writer.transport.abort()
    return str(name)


def test_a_changed_certificate_is_shown_without_a_restart(
    authority: Authority, tmp_path: Path
) -> None:
    async def main() -> None:
        used = authority.issue("first")
        known = credentials(authority)
        files: dict[str, Any] = {"tls_cert": str(used.cert), "tls_key": str(used.key)}
        model = write_ids_only_model(tmp_path / "model")
        async with serving(model, credentials=known, **files) as served:
            port = served.engine.port
            assert await subject(port, authority) == "first"
            authority.issue("second").move_to(used)
            assert await subject(port, authority) == "second"
            # A connection of before goes on.
            await within(served.stub.GetModelInfo(INFO))
            authority.issue("dead", starts_in=-2 * DAY, ends_in=-DAY).move_to(used)
            assert await subject(port, authority) == "second"
            assert await ask(port, known) == "ok"

    asyncio.run(main())


def test_a_bad_certificate_stops_the_start(authority: Authority, tmp_path: Path) -> None:
    pair = authority.issue("expired", starts_in=-2 * DAY, ends_in=-DAY)
    files: dict[str, Any] = {"tls_cert": str(pair.cert), "tls_key": str(pair.key)}
    with pytest.raises(TlsFileError, match=r"expired\.pem: certificate has expired"):
        PublicAccess.read(frontend_config(tmp_path, **files))
