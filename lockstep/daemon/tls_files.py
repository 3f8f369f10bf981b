"""Certificates and keys from PEM files, checked when they are read: a bad one has a clear error.

gRPC itself takes any bytes and then refuses every handshake without saying why. So a certificate is
first shown in a TLS handshake within this process, to a peer that trusts what its real peers will:
that finds what any of them would refuse (expired, wrong purpose, wrong issuer), in OpenSSL's words.
"""

import logging
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.daemon.watched_files import WatchedFiles

_LOG = logging.getLogger(__name__)
_MAX_FLIGHTS = 10


class TlsFileError(Exception):
    """A file is missing, unreadable, expired or does not fit the others; the message names it."""


@dataclass(frozen=True)
class TlsFiles:
    """One side's certificate chain and private key, and the CA that its peers must be of.

    `ca` None: peers need no certificate. `issuer_ca`: our own certificate must be of `ca` too, as
    in a group whose members all are.
    """

    cert: Path
    key: Path
    ca: Path | None = None
    issuer_ca: bool = False

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.cert, self.key) if self.ca is None else (self.cert, self.key, self.ca)


@dataclass(frozen=True)
class TlsMaterial:
    """The files' contents, PEM."""

    cert: bytes
    key: bytes = field(repr=False)
    ca: bytes | None


def read_tls_files(files: TlsFiles, is_server: bool) -> TlsMaterial:
    """Reads and checks; raises TlsFileError. `is_server`: the side that our certificate is for."""
    cert, key = _read(files.cert), _read(files.key)
    ca = None if files.ca is None else read_ca(files.ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    if b"-----BEGIN CERTIFICATE-----" not in cert:
        raise TlsFileError(f"{files.cert}: no PEM certificate in it")
    if b"PRIVATE KEY-----" not in key:
        raise TlsFileError(f"{files.key}: no PEM private key in it")
    if b"ENCRYPTED" in key:
        raise TlsFileError(f"{files.key}: it is encrypted; a daemon cannot ask for its password")
    try:
        context.load_cert_chain(files.cert, files.key)
    except ssl.SSLError as error:
        if "MISMATCH" in (error.reason or ""):
            raise TlsFileError(
                f"{files.key} is not the private key of the certificate in {files.cert}"
            ) from None
        raise TlsFileError(f"{files.cert} and {files.key}: {_words(error)}") from None
    _rehearse(files, context, is_server)
    return TlsMaterial(cert, key, ca)


def read_ca(path: Path) -> bytes:
    """A bundle of CA certificates; raises TlsFileError."""
    bundle = _read(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=bundle.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise TlsFileError(f"{path}: no PEM certificates: {_words(error)}") from None
    if not context.get_ca_certs():
        raise TlsFileError(f"{path}: none of its certificates is a CA's")
    return bundle


class ReloadedTls:
    """Files that may be replaced while a server runs. `changed` may be called from any thread."""

    def __init__(self, files: TlsFiles, is_server: bool) -> None:
        """Raises TlsFileError."""
        self._files = files
        self._is_server = is_server
        self._lock = threading.Lock()
        self._watched = WatchedFiles(files.paths)
        self.first = read_tls_files(files, is_server)

    def changed(self) -> TlsMaterial | None:
        """New contents, once after the files have changed. Bad ones are logged and not taken."""
        with self._lock:
            if not self._watched.have_changed():
                return None
            try:
                material = read_tls_files(self._files, self._is_server)
            except TlsFileError as error:
                _LOG.error("the changed certificate is not used: %s", error)
                return None
        _LOG.info("took the changed certificate from %s", self._files.cert)
        return material


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsFileError(f"{path}: {error.strerror}") from None


def _rehearse(files: TlsFiles, ours: ssl.SSLContext, is_server: bool) -> None:
    """Shakes hands in memory with a peer that trusts our issuer; raises TlsFileError."""
    peer = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if is_server else ssl.PROTOCOL_TLS_SERVER)
    for context in (ours, peer):
        context.check_hostname = False
    ours.verify_mode = ssl.CERT_NONE
    peer.verify_mode = ssl.CERT_REQUIRED
    if files.issuer_ca and files.ca is not None:
        peer.load_verify_locations(cafile=files.ca)
    else:
        # Who issued it is the clients' to judge; all else is checked on the certificate itself.
        peer.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        peer.load_verify_locations(cafile=files.cert)
    if not is_server:
        peer.load_cert_chain(files.cert, files.key)
    try:
        _shake_hands(*((ours, peer) if is_server else (peer, ours)))
    except ssl.SSLCertVerificationError as error:
        raise TlsFileError(f"{files.cert}: {error.verify_message}") from None
    except ssl.SSLError as error:
        raise TlsFileError(f"{files.cert}: {_words(error)}") from None


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(_MAX_FLIGHTS):
        for end in tuple(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                continue
        if not ends:
            return
    raise AssertionError("a TLS handshake takes fewer flights")


def _words(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).lower().replace("_", " ") if reason else str(error)
