"""What tests of marked images share: exiftool's reading of files, and a certificate authority."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.servers import unavailable

if TYPE_CHECKING:
    from pathlib import Path

_NOW = dt.datetime.now(dt.UTC)


def exiftool(*files: Path) -> list[dict[str, object]]:
    """Return what exiftool reads of each file, by ``Group:Tag``; skip where it is missing, but fail in CI."""
    program = shutil.which("exiftool")
    if program is None:
        unavailable("exiftool is not installed (Debian: libimage-exiftool-perl)")
    done = subprocess.run(
        [program, "-json", "-G", "-n", "-struct", *map(str, files)], capture_output=True, check=True
    )
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


@cache
def private_key(kind: str):
    """A key of that kind, the same at each call; they are slow to make."""
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    if kind.startswith("rsa"):
        return rsa.generate_private_key(65537, int(kind.removeprefix("rsa")))
    curves = {"p256": ec.SECP256R1, "p384": ec.SECP384R1, "p521": ec.SECP521R1}
    return ec.generate_private_key(curves[kind.partition("-")[0]]())


def key_pem(kind: str) -> str:
    """The key as PKCS #8, not encrypted."""
    return private_key(kind).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


@dataclass(frozen=True)
class Authority:
    """A certificate authority with a root alone; ``kind`` of its key."""

    name: str = "Root of the tests"
    kind: str = "p256-root"

    @property
    def root(self) -> str:
        """Its own certificate, as PEM."""
        return _certificate(self.name, self.kind, self, ca=True)

    def leaf(self, kind: str = "p256", *, days: tuple[float, float] = (-1, 30), purpose: bool = True) -> str:
        """A certificate for signing images with the key of that kind, valid between these days from now."""
        return _certificate("Studio 9", kind, self, days=days, purpose=purpose)

    def chain(self, kind: str = "p256", **more) -> str:
        """A leaf, and the root behind it."""
        return self.leaf(kind, **more) + self.root


def _certificate(subject, kind, issuer, *, ca=False, days=(-1, 30), purpose=True) -> str:  # noqa: PLR0913
    key, issuing = private_key(kind), private_key(issuer.kind)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer.name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_NOW + dt.timedelta(days=days[0]))
        .not_valid_after(_NOW + dt.timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(
            x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False),
            critical=True,
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuing.public_key()), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if purpose and not ca:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(usage, critical=False)
    algorithm = None if isinstance(issuing, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(issuing, algorithm).public_bytes(Encoding.PEM).decode()


def _name(common: str) -> x509.Name:
    parts = (NameOID.COMMON_NAME, common), (NameOID.ORGANIZATION_NAME, "Tests")
    return x509.Name([x509.NameAttribute(*part) for part in parts])
