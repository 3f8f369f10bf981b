"""Certificate authorities and certificates, made when a test needs them."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_DAY = datetime.timedelta(days=1)
_USAGES = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}


@dataclass(frozen=True)
class Pair:
    """Paths of a certificate and its key, PEM."""

    cert: Path
    key: Path

    def move_to(self, other: Pair) -> None:
        """Replaces the other's files by these."""
        self.key.replace(other.key)
        self.cert.replace(other.cert)


class Authority:
    """A CA whose certificate is at `cert`; it issues for localhost, 127.0.0.1 and `names`."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        ca = _builder(self._name, self._name, self._key, -_DAY, 30 * _DAY)
        ca = ca.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.cert = folder / f"{name}.pem"
        self.cert.write_bytes(_pem(ca.sign(self._key, hashes.SHA256())))

    def issue(
        self,
        name: str,
        names: tuple[str, ...] = (),
        starts_in: datetime.timedelta = -_DAY,
        ends_in: datetime.timedelta = _DAY,
        usage: str = "",
    ) -> Pair:
        """A certificate with that common name; `usage` "server" or "client" allows nothing else."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name(name), self._name, key, starts_in, ends_in)
        entries: list[x509.GeneralName] = [x509.DNSName(n) for n in ("localhost", *names)]
        entries.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        builder = builder.add_extension(x509.SubjectAlternativeName(entries), critical=False)
        if usage:
            usages = x509.ExtendedKeyUsage([_USAGES[usage]])
            builder = builder.add_extension(usages, critical=False)
        pair = Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        pair.cert.write_bytes(_pem(builder.sign(self._key, hashes.SHA256())))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return pair


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    starts_in: datetime.timedelta,
    ends_in: datetime.timedelta,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + starts_in)
        .not_valid_after(now + ends_in)
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
