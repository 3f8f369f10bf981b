"""A whole group with everything on: TLS, client certificates, API keys, mutual TLS to the workers.

And what a stray process gets to hear at each of its ports.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.group_secret import TOKEN_KEY, join_token
from lockstep.errors import CallFailed
from protos.lockstep.v1 import worker_pb2, worker_pb2_grpc
from tests.helpers.certificates import Authority, Pair
from tests.helpers.connection import Connection
from tests.helpers.message_client import Client, chat_request, ids_request, text_request
from tests.helpers.served_group import ServedGroup

pytestmark = pytest.mark.timeout(240)  # includes the start of the group, perhaps on busy cores
_LIMIT_S = 60.0
_KEYS = {"acme": "key-of-acme", "other": "key-of-other"}
_SECRET = b"0123456789abcdef0123456789abcdef"
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Secured:
    """The group, its files, and how its tenants reach it."""

    served: ServedGroup
    folder: Path
    clients: Authority
    members: Authority
    client_pair: Pair
    member: Pair

    def connection(self, tenant: str = "acme") -> Connection:
        return Connection(
            self.served.address,
            tls_ca=(self.folder / "public" / "public.pem").read_bytes(),
            tls_cert=self.client_pair.cert.read_bytes(),
            tls_key=self.client_pair.key.read_bytes(),
            api_key=_KEYS[tenant],
        )

    def words(self) -> list[str]:
        """The same as flags of the commands."""
        return [
            *("--address", self.served.address, "--tls-ca", str(self.folder / "public/public.pem")),
            *("--tls-cert", str(self.client_pair.cert), "--tls-key", str(self.client_pair.key)),
            *("--api-key-file", str(self.folder / "key-of-acme")),
        ]


@pytest.fixture(scope="module")
def model_dir(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration and tokenizer without weights."""
    folder = tmp_path_factory.mktemp("no-weights")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2_dir / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def secured(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    public = Authority(folder / "public", "public")
    clients, members = Authority(folder / "clients"), Authority(folder / "members")
    server, member = public.issue("server", usage="server"), members.issue("member")
    lines = [f"{t} sha256:{hashlib.sha256(k.encode()).hexdigest()}\n" for t, k in _KEYS.items()]
    (folder / "keys").write_text("".join(lines))
    (folder / "key-of-acme").write_text(_KEYS["acme"] + "\n")
    (folder / "secret").write_bytes(_SECRET)
    flags = ["--tp", "2", "--step-ms", "5", "--token-text", "ascii", "--num-blocks", "400"]
    flags += ["--tls-cert", str(server.cert), "--tls-key", str(server.key)]
    flags += ["--tls-client-ca", str(clients.cert), "--api-keys", str(folder / "keys")]
    flags += ["--group-cert", str(member.cert), "--group-key", str(member.key)]
    flags += ["--group-ca", str(members.cert), "--group-secret", str(folder / "secret")]
    pair = clients.issue("client", usage="client")
    (folder / "group").mkdir()
    with ServedGroup(model_dir, folder / "group", *flags, subcommand="simulate") as served:
        yield Secured(served, folder, clients, members, pair, member)


def lockstep(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lockstep", *words],
        cwd=_ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
    )


def test_a_client_that_proves_itself_is_served(secured: Secured) -> None:
    with Client(secured.connection()) as client:
        answer = client.generate_unary(text_request("Hello", max_tokens=5), _LIMIT_S)
        assert answer.finished.usage.output_token_count == 5
        assert len(list(client.generate(text_request("Hello", max_tokens=5), _LIMIT_S))) >= 1


def test_the_commands_reach_it_by_their_flags(secured: Secured) -> None:
    said = lockstep("health", *secured.words())
    assert (said.returncode, said.stdout) == (0, "SERVING\n"), said.stderr
    said = lockstep("generate", "--token-ids", "1,2,3", "--max-tokens", "4", *secured.words())
    assert said.returncode == 0, said.stderr
    said = lockstep("generate", "--prompt", "x", *secured.words()[:-2])
    assert said.returncode == 1
    assert "UNAUTHENTICATED" in said.stderr
    said = lockstep("generate", "--prompt", "x", *secured.words()[:-1], "/no/such/key")
    assert (said.returncode, said.stderr.count("\n")) == (ExitCode.CONFIG, 1)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"tls_ca": None}, "UNAVAILABLE"),
        ({"tls_cert": None, "tls_key": None}, "UNAVAILABLE"),
        ({"tls_ca": b""}, "UNAVAILABLE"),
        ({"api_key": None}, "UNAUTHENTICATED"),
        ({"api_key": "key-of-nobody"}, "UNAUTHENTICATED"),
    ],
)
def test_a_client_that_lacks_a_proof_is_not(
    secured: Secured, change: dict[str, Any], code: str
) -> None:
    with Client(replace(secured.connection(), **change)) as client:
        with pytest.raises(CallFailed) as failed:
            client.server_info()
        assert failed.value.code == code


def test_tenants_may_use_the_same_name_and_cannot_abort_each_other(secured: Secured) -> None:
    request = ids_request([1, 2, 3], max_tokens=2000, ignore_eos=True)
    request.request_id = "the same"
    with Client(secured.connection("acme")) as acme, Client(secured.connection("other")) as other:
        mine, theirs = acme.generate(request, _LIMIT_S), other.generate(request, _LIMIT_S)
        first_of_each = [next(iter(mine)), next(iter(theirs))]
        assert all(delta.token_ids for delta in first_of_each)
        again = acme.generate(request, _LIMIT_S)
        with pytest.raises(CallFailed, match="request_id is 'the same'"):
            list(again)
        assert acme.abort("the same")
        list(mine)
        assert mine.finished is not None and mine.finished.finish_reason == 3  # ABORTED
        assert not acme.abort("the same")  # the other's still runs, out of reach
        assert next(iter(theirs)).token_ids
        assert other.abort("the same")


def shut_down(address: str, shown: Any, metadata: Any) -> grpc.StatusCode:
    """How a worker answers the order to end, from whoever shows that."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    channel = (
        grpc.insecure_channel(address, options)
        if shown is None
        else grpc.secure_channel(address, shown, options)
    )
    with channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        try:
            stub.Shutdown(worker_pb2.ShutdownRequest(), timeout=20, metadata=metadata)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


def test_a_stray_process_cannot_drive_a_worker(secured: Secured) -> None:
    with Client(secured.connection()) as client:
        info = client.server_info()
        address = info.ranks[1].address
        ca = secured.members.cert.read_bytes()
        member = grpc.ssl_channel_credentials(
            ca, secured.member.key.read_bytes(), secured.member.cert.read_bytes()
        )
        stranger = secured.clients.issue("stranger")
        of_another_ca = grpc.ssl_channel_credentials(
            ca, stranger.key.read_bytes(), stranger.cert.read_bytes()
        )
        token = ((TOKEN_KEY, join_token(_SECRET, info.epoch)),)
        earlier = ((TOKEN_KEY, join_token(_SECRET, info.epoch - 1)),)
        forged = ((TOKEN_KEY, join_token(b"not the secret..", info.epoch)),)
        for shown in (None, grpc.ssl_channel_credentials(ca), of_another_ca):
            assert shut_down(address, shown, token) is grpc.StatusCode.UNAVAILABLE
        for metadata in ((), earlier, forged, (*token, *token)):
            assert shut_down(address, member, metadata) is grpc.StatusCode.UNAUTHENTICATED
        assert client.generate_unary(text_request("Hi", max_tokens=2), _LIMIT_S).finished
        assert client.server_info().epoch == info.epoch


def test_handshakes_that_fail_leave_no_lines_in_the_log(secured: Secured) -> None:
    before = secured.served.log_text().count("\n")
    host, _, port = secured.served.address.rpartition(":")
    for _ in range(20):
        with socket.create_connection((host, int(port)), timeout=_LIMIT_S) as plain:
            plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert plain.recv(100) == b""
    assert secured.served.log_text().count("\n") == before


def test_logs_hold_neither_prompts_nor_keys(secured: Secured) -> None:
    marker = "xyzzy-quuz"
    good = text_request(f"say {marker}", max_tokens=2)
    chat = chat_request([{"role": marker, "content": marker}], max_tokens=2)
    bad = text_request(marker, max_tokens=2, stop=[marker * 100])
    long = text_request(marker, max_tokens=1 << 30)
    with Client(secured.connection()) as client:
        for request in (good, chat):
            assert client.generate_unary(request, _LIMIT_S).finished
        for request in (bad, long):
            with pytest.raises(CallFailed):
                client.generate_unary(request, _LIMIT_S)
        running = client.generate(text_request(marker, max_tokens=2000, ignore_eos=True))
        next(iter(running))
        running.cancel()
    with (
        Client(replace(secured.connection(), api_key=marker)) as stranger,
        pytest.raises(CallFailed),
    ):
        stranger.server_info()
    said = secured.served.log_text()
    assert "xyzzy" not in said
    assert not any(key in said for key in _KEYS.values())
    assert _SECRET.decode() not in said


def start_worker(model: Path, folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "worker.simulated", "--model", str(model), "--port", "0"]
    command += ["--metrics-port", "0", "--ready-file", str(folder / "ready.json"), *flags]
    return subprocess.Popen(
        command, cwd=_ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def wait_address(folder: Path, worker: subprocess.Popen[str]) -> str:
    limit = threading.Event()
    for _ in range(int(_LIMIT_S / 0.05)):
        if (folder / "ready.json").exists():
            return str(json.loads((folder / "ready.json").read_text())["grpc"])
        assert worker.poll() is None
        limit.wait(0.05)
    raise AssertionError("the worker does not start")


@pytest.mark.parametrize("secret", [b"", b"another secret of the group"])
def test_a_coordinator_without_the_groups_secret_stops_and_says_so(
    model_dir: Path, tmp_path: Path, secret: bytes
) -> None:
    (tmp_path / "ours").write_bytes(_SECRET)
    flags = []
    if secret:
        (tmp_path / "theirs").write_bytes(secret)
        flags = ["--group-secret", str(tmp_path / "theirs")]
    worker = start_worker(model_dir, tmp_path, "--group-secret", str(tmp_path / "ours"))
    try:
        address = wait_address(tmp_path, worker)
        said = lockstep(
            *("coordinator", "--model", str(model_dir), "--workers", address, "--port", "0"),
            *("--metrics-port", "0", *flags),
        )
    finally:
        worker.kill()
        worker.communicate(timeout=_LIMIT_S)
    assert said.returncode == ExitCode.CONFIG, said.stderr
    lines = [line for line in said.stderr.splitlines() if "--group-secret" in line]
    assert len(lines) == 1, said.stderr
    assert address in lines[0]


def group_flags(pair: Pair, ca: Path) -> list[str]:
    return ["--group-cert", str(pair.cert), "--group-key", str(pair.key), "--group-ca", str(ca)]


def worker_name(address: str, pair: Pair, ca: Path) -> str:
    """Common name of the certificate that a worker shows to a member of its group."""
    context = ssl.create_default_context(cafile=str(ca))
    context.load_cert_chain(pair.cert, pair.key)
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=_LIMIT_S) as plain,
        context.wrap_socket(plain, server_hostname=host) as secured_socket,
    ):
        subject: Any = (secured_socket.getpeercert() or {})["subject"]
        return str(dict(entry[0] for entry in subject)["commonName"])


def test_groups_of_two_authorities_do_not_meet_and_a_worker_takes_a_new_certificate(
    model_dir: Path, tmp_path: Path
) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    used, member = ours.issue("first"), ours.issue("member")
    worker = start_worker(model_dir, tmp_path, *group_flags(used, ours.cert))
    try:
        address = wait_address(tmp_path, worker)
        words = ["coordinator", "--model", str(model_dir), "--workers", address, "--port", "0"]
        words += ["--metrics-port", "0", "--startup-timeout", "2"]
        for flags, why in (
            (group_flags(theirs.issue("stranger"), theirs.cert), "andshake failed"),
            ([], address),
        ):
            said = lockstep(*words, *flags)
            assert said.returncode == ExitCode.GROUP_LOST, said.stderr
            lines = [line for line in said.stderr.splitlines() if "rank 0 at" in line]
            assert any(why in line for line in lines), said.stderr
        assert worker_name(address, member, ours.cert) == "first"
        ours.issue("second").move_to(used)
        assert worker_name(address, member, ours.cert) == "second"
    finally:
        worker.kill()
        worker.communicate(timeout=_LIMIT_S)


@pytest.mark.parametrize("daemon", ["worker.simulated", "coordinator"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--group-cert", "none", "--group-key", "none", "--group-ca", "none"], "none: No such"),
        (["--group-secret", "none"], "--group-secret none: No such file"),
        (["--group-cert", "none"], "go together"),
        (["--host", "0.0.0.0"], "--allow-plaintext"),
    ],
)
def test_a_daemon_whose_settings_do_not_hold_stops_with_one_line(
    model_dir: Path, daemon: str, flags: list[str], words: str
) -> None:
    if daemon == "coordinator":
        flags = [*flags, "--workers", "127.0.0.1:1"]
    said = subprocess.run(
        [sys.executable, "-m", daemon, "--model", str(model_dir), *flags],
        cwd=_ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
    )
    assert said.returncode == ExitCode.CONFIG, said.stderr
    assert said.stderr.count("\n") == 1, said.stderr
    assert words in said.stderr
