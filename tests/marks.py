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

NOW = dt.datetime.now(dt.UTC)


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
        return rsa.generate_private_key(65537, int(kind.removeprefix("rsa").partition("-")[0]))
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

    def leaf(self, kind: str = "p256", **more) -> str:
        """A certificate for signing images with the key of that kind; ``days`` from now when it is valid."""
        return _certificate("Studio 9", kind, self, **more)

    def chain(self, kind: str = "p256", **more) -> str:
        """A leaf, and the root behind it."""
        return self.leaf(kind, **more) + self.root


def stamped(query: bytes, folder: Path, authority: Authority) -> bytes:
    """The answer of a time-stamping service of that authority to a query (RFC 3161), by openssl."""
    settings = """
        default_tsa = tsa
        [tsa]
        serial = serial
        signer_digest = sha256
        digests = sha256, sha384, sha512
        default_policy = 1.2.3.4.1
        ess_cert_id_alg = sha256
    """
    (folder / "tsa.cnf").write_text("\n".join(map(str.strip, settings.splitlines())))
    (folder / "serial").write_text("01")
    (folder / "stamp.pem").write_text(
        _certificate("Time stamps", "rsa2048-stamps", authority, usage=ExtendedKeyUsageOID.TIME_STAMPING)
    )
    (folder / "stamp.key").write_text(key_pem("rsa2048-stamps"))
    (folder / "query").write_bytes(query)
    (folder / "root.pem").write_text(authority.root)
    openssl = shutil.which("openssl") or unavailable("openssl is not installed")
    answer = "ts -reply -config tsa.cnf -queryfile query -signer stamp.pem -inkey stamp.key -chain root.pem"
    subprocess.run([openssl, *answer.split(), "-out", "answer"], cwd=folder, capture_output=True, check=True)
    return (folder / "answer").read_bytes()


def _certificate(  # noqa: PLR0913
    subject, kind, issuer, *, ca=False, days=(-1, 30), usage=ExtendedKeyUsageOID.EMAIL_PROTECTION
) -> str:
    key, issuing = private_key(kind), private_key(issuer.kind)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer.name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + dt.timedelta(days=days[0]))
        .not_valid_after(NOW + dt.timedelta(days=days[1]))
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
    if usage and not ca:
        stamps = usage is ExtendedKeyUsageOID.TIME_STAMPING
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=stamps)
    algorithm = None if isinstance(issuing, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(issuing, algorithm).public_bytes(Encoding.PEM).decode()


def _name(common: str) -> x509.Name:
    parts = (NameOID.COMMON_NAME, common), (NameOID.ORGANIZATION_NAME, "Tests")
    return x509.Name([x509.NameAttribute(*part) for part in parts])
