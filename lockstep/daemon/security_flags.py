"""The settings by which daemons prove who they are, and what they refuse to start with."""

import ipaddress
from pathlib import Path

from lockstep.daemon.flags import Flag, FlagError, on_off, positive_int
from lockstep.daemon.tls_files import TlsFiles

# Of the public port: the coordinator's alone.
PUBLIC_FLAGS = (
    Flag("tls-cert", str, "", "PEM certificate chain of the public port; with it TLS only"),
    Flag("tls-key", str, "", "PEM private key of --tls-cert"),
    Flag("tls-client-ca", str, "", "PEM CAs; clients must show a certificate of one of them"),
    Flag("api-keys", str, "", "file of API keys, one a line: tenant and sha256:<hex of the key>"),
)
CONNECTION_FLAGS = (
    Flag("max-connections", positive_int, 4096, "most connections of clients to one frontend"),
    Flag("max-concurrent-streams", positive_int, 2048, "most open calls on one connection"),
)
# Between coordinator and workers: the same files may serve all daemons of a group.
GROUP_FLAGS = (
    Flag("group-cert", str, "", "PEM certificate between coordinator and workers: mutual TLS"),
    Flag("group-key", str, "", "PEM private key of --group-cert"),
    Flag("group-ca", str, "", "PEM CA of every daemon of the group"),
    Flag("group-secret", str, "", "file with a secret that all daemons of the group share"),
)
ALLOW_PLAINTEXT = Flag(
    "allow-plaintext", on_off, False, "on: serve beyond the loopback without TLS"
)


def is_loopback(host: str) -> bool:
    """Only this host reaches that address. Names other than localhost count as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(host: str, is_guarded: bool, allow_plaintext: bool, remedy: str) -> None:
    """Refuses to serve others in the clear by accident. Raises FlagError."""
    if not (is_loopback(host) or is_guarded or allow_plaintext):
        raise FlagError(
            f"--host is {host}, which others can reach, and there is no TLS: {remedy}, or say "
            "--allow-plaintext on if something else guards the port"
        )


def public_tls(cert: str, key: str, client_ca: str) -> TlsFiles | None:
    """The files of the public port; None: no TLS. Raises FlagError."""
    if bool(cert) != bool(key):
        raise FlagError("--tls-cert and --tls-key go together: give both or neither")
    if client_ca and not cert:
        raise FlagError("--tls-client-ca needs --tls-cert and --tls-key")
    if not cert:
        return None
    return TlsFiles(Path(cert), Path(key), Path(client_ca) if client_ca else None)


def group_tls(cert: str, key: str, ca: str) -> TlsFiles | None:
    """The files between the daemons of a group; None: no TLS there. Raises FlagError."""
    if len({bool(cert), bool(key), bool(ca)}) > 1:
        raise FlagError("--group-cert, --group-key and --group-ca go together: give all or none")
    return TlsFiles(Path(cert), Path(key), Path(ca), issuer_ca=True) if cert else None
