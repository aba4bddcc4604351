"""The marks of an image, and whether they hold: marks inspected, C2PA manifests signed and read.

c2pa-python (the extra ``c2pa``) is imported only to sign, or to read a manifest that is there.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from text2img import __version__
from text2img.concurrency.timeouts import run_with_timeout
from text2img.errors import ConfigurationError, RunFailed
from text2img.images import (
    JUMBF,
    MAX_STATEMENT_CHARS,
    SOURCE_TYPE,
    embedded_text,
    holds_manifest,
    is_generated,
    read_xmp,
    without_controls,
)
from text2img.settings import expand_home

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cryptography import x509
    from PIL.Image import Image as PILImage

log = logging.getLogger(__name__)


class State(StrEnum):
    """The verdict on an image's marks."""

    TRUSTED = "trusted"  # a manifest that holds, signed under one of the trust anchors
    VALID = "valid"  # a manifest that holds, signed under any other authority
    UNSIGNED = "unsigned"  # XMP declares that a model made it; there is no manifest
    BROKEN = "broken"  # its marks contradict one another or the file
    UNMARKED = "no mark"


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """The marks of an image's file: their ``state``, and the ``reason`` for it in words.

    ``parameters``, ``xmp`` and ``manifest`` are what the file holds of each, None for what is missing.
    """

    state: State
    reason: str
    parameters: Mapping[str, object] | None = None
    xmp: Mapping[str, str] | None = None
    manifest: Mapping[str, object] | None = None


_FORMATS: Final = ("PNG", "JPEG", "WEBP")
_MAX_PIXELS: Final = 64_000_000


def inspect(file: bytes, trust_anchors: str | None = None) -> Marks:
    """Return the marks of an image's file, and whether they hold; the file may be anything.

    ``trust_anchors`` are certificates in PEM. Raises ConfigurationError if c2pa-python is needed and missing.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file), formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                return Marks(state=State.BROKEN, reason=f"it has more than {_MAX_PIXELS:,} pixels")
            content_type = str(image.get_format_mimetype())
            text, packet = _text(image), image.info.get("xmp", b"")
            image.load()
        if content_type == "image/png":
            with Image.open(io.BytesIO(file), formats=_FORMATS) as image:
                image.verify()  # the checksums of all chunks
    except Exception:  # noqa: BLE001 - whatever a hostile file does to its decoder, it is broken
        reason = "it is not a whole image in PNG, JPEG or WebP"
        return Marks(state=State.BROKEN, reason=reason)
    parameters, xmp, faults = _statements(text, packet)
    read = {"parameters": parameters, "xmp": xmp}
    if faults:
        return Marks(state=State.BROKEN, reason=faults[0], **read)
    if not holds_manifest(file):
        state, reason = _judged_by_xmp(parameters, xmp)
        return Marks(state=state, reason=reason, **read)
    manifest = read_manifest(file, content_type, trust_anchors)
    state, reason = _judged_by_manifest(manifest, file, text)
    return Marks(state=state, reason=reason, manifest=manifest, **read)


def _text(image: PILImage) -> str:
    """Return the JSON of the parameters in the image, empty for one that has other programs' texts."""
    try:
        text = embedded_text(image)
    except (UnicodeError, ValueError, TypeError):
        return ""
    return text if text.startswith("{") else ""


def _statements(text: str, packet: bytes) -> tuple[dict[str, Any] | None, dict[str, str] | None, list[str]]:
    """Return the parameters, the XMP, and what is wrong with them."""
    parameters: dict[str, Any] | None = None
    xmp: dict[str, str] | None = None
    faults: list[str] = []
    try:
        parameters = json.loads(text, parse_constant=_refuse) if text else None
    except (ValueError, RecursionError):
        faults.append("its parameters cannot be read")
    try:
        xmp = read_xmp(packet) if packet else None
    except (ValueError, RecursionError) as exc:
        faults.append(f"its XMP cannot be read: {exc}")
    if parameters and xmp and (named := xmp.get("AISystemUsed")):
        model = without_controls(str(parameters.get("model"))[:MAX_STATEMENT_CHARS])
        if named.split() != model.split():
            faults.append("its parameters and its XMP name different models")
    return parameters, xmp, faults


def _refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN and Infinity: no JSON output could hold them


def _judged_by_xmp(
    parameters: Mapping[str, object] | None, xmp: Mapping[str, str] | None
) -> tuple[State, str]:
    if is_generated(xmp or {}):
        return State.UNSIGNED, "its XMP declares that a model made it; it is not signed"
    if source := (xmp or {}).get("DigitalSourceType"):
        return State.UNMARKED, f"its XMP names another source: {source[:200]}"
    if parameters and str(parameters.get("software")).startswith("text2img "):
        software = str(parameters["software"])[:40]
        return State.UNMARKED, f"{software} made it without a mark, or its XMP was removed"
    removed = "they were removed, or another program made it"
    return State.UNMARKED, f"it has no XMP, no manifest and no parameters of text2img: {removed}"


def _framing_holds(file: bytes) -> bool:
    """Return whether the boxes and the padding of the manifests in a file are as c2pa writes them.

    No signature covers them. They declare nothing, but a changed bit shows that the file is not the one that
    was signed.
    """
    boxes = [file[box.end() : box.end() + 40] for box in re.finditer(rb"jumb.{4}jumd", file, re.DOTALL)]
    for box in boxes:
        label = _LABELS.get(box[:4], b"")
        if box[4:16] != JUMBF or box[16:17] not in {b"\x03", b"\x13"} or not box[17:].startswith(label):
            return False
    paddings = re.finditer(rb"cpadY(..)", file, re.DOTALL)  # CBOR: a byte string with two bytes of length
    return not any(file[pad.end() : pad.end() + int.from_bytes(pad[1])].strip(b"\0") for pad in paddings)


_LABELS: Final = {
    b"c2pa": b"c2pa\0",
    b"c2as": b"c2pa.assertions\0",
    b"c2cl": b"c2pa.claim",
    b"c2cs": b"c2pa.signature\0",
}


def _judged_by_manifest(manifest: Mapping[str, Any], file: bytes, text: str) -> tuple[State, str]:
    if manifest["state"] not in {"Valid", "Trusted"}:
        codes = ", ".join(manifest["failures"]) or "it cannot be read"
        return State.BROKEN, f"its manifest does not hold: {codes}"
    if not _framing_holds(file):
        return (
            State.BROKEN,
            "its manifest was changed after it was signed, outside of what the signature covers",
        )
    expected = manifest["parameters_sha256"]
    if expected is not None and expected != hashlib.sha256(text.encode()).hexdigest():
        return State.BROKEN, "its parameters are not those that were signed"
    signer = manifest["signer"] or manifest["issuer"] or "an unnamed certificate"
    if manifest["state"] == "Trusted":
        return State.TRUSTED, f"signed by {signer}, under a trust anchor"
    return State.VALID, f"signed by {signer}, under an authority that is not among the trust anchors"


_SETTINGS: Final = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"verify_after_sign": False, "remote_manifest_fetch": False, "ocsp_fetch": False},
}
"""c2pa's settings: a thumbnail would take ten times as long, and reading a file must fetch nothing."""


def _c2pa(option: str) -> Any:
    """Return the module c2pa; raise ConfigurationError, which names the ``option``, where it is missing."""
    try:
        import c2pa
    except ImportError:
        raise ConfigurationError(f"{option} needs c2pa-python; pip install 'c2pa-python==0.38.1'") from None
    return c2pa


def read_manifest(file: bytes, content_type: str, trust_anchors: str | None = None) -> dict[str, Any]:
    """Return the statements of a file's active manifest, and c2pa's verdict on it; nothing is fetched.

    ``state`` is Trusted, Valid or Invalid, and ``failures`` are codes of the C2PA specification.
    """
    c2pa = _c2pa("a C2PA manifest")
    trust = {"trust": {"trust_anchors": trust_anchors}} if trust_anchors else {}
    try:
        with (
            c2pa.Context.from_dict({**_SETTINGS, **trust}) as context,
            c2pa.Reader(content_type, io.BytesIO(file), context=context) as reader,
        ):
            return _summary(json.loads(reader.json()))
    except Exception as exc:  # noqa: BLE001 - whatever a hostile file does to its parser, it does not hold
        reason = _one_line(exc) if isinstance(exc, c2pa.C2paError) else "it cannot be read"
        return _summary({}) | {"failures": [reason]}


def _summary(store: Mapping[str, Any]) -> dict[str, Any]:
    """Return the statements of the active manifest in c2pa's report; raise any error for a malformed one."""
    active = store["manifests"][store["active_manifest"]] if store else {}
    signature = active.get("signature_info", {})
    generator = (active.get("claim_generator_info") or [{}])[0]
    assertions = {each["label"]: each["data"] for each in active.get("assertions", ()) if "data" in each}
    actions: list[dict[str, Any]] = next(
        (data["actions"] for label, data in assertions.items() if label.startswith("c2pa.actions")), []
    )
    generation = assertions.get(_GENERATION, {})
    return {
        "state": store.get("validation_state", "Invalid"),
        "failures": sorted(
            {status["code"] for status in store.get("validation_status", ())}
            - {"signingCredential.untrusted"}
        ),
        "signer": signature.get("common_name"),
        "issuer": signature.get("issuer"),
        "algorithm": signature.get("alg"),
        "time": signature.get("time"),
        "generator": f"{generator.get('name', '')} {generator.get('version', '')}".strip(),
        "source_type": next(
            (each["digitalSourceType"] for each in actions if "digitalSourceType" in each), None
        ),
        "actions": [each.get("action") for each in actions],
        "ingredients": [each.get("title") for each in active.get("ingredients", ())],
        **{name: generation.get(name) for name in _CLAIMED},
    }


_GENERATION: Final = "text2img.generation"
"""The assertion with the model, its revision, and the SHA-256 of the parameters in the file."""
_CLAIMED: Final = ("model", "revision", "parameters_sha256")


class ManifestSigner:
    """Signs C2PA manifests into image files. Safe to use from several threads.

    ``certificate`` is a chain, each certificate followed by its issuer, and ``key`` the first one's private
    key: PEM text, or the path of a PEM file. With ``timestamp_url`` each signature carries a time stamp,
    unless the service fails. Raises ConfigurationError unless a small image can be signed.
    """

    def __init__(
        self,
        certificate: str,
        key: str,
        timestamp_url: str | None = None,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if timestamp_url is not None and not timestamp_url.startswith(("http://", "https://")):
            raise ConfigurationError(f"{_URL_OPTION} must begin with http:// or https://")
        self._c2pa = _c2pa(_CERTIFICATE_OPTION)
        chain, certificates = _certificates(_pem(_CERTIFICATE_OPTION, certificate))
        self._now, self._clock = now, clock
        self._valid_until = min(each.not_valid_after_utc for each in chain)
        self._algorithm, secret = _key(_pem(_KEY_OPTION, key), chain[0])
        _check_chain(chain, datetime.fromtimestamp(now(), UTC))
        self.name = _subject(chain[0])
        self._credentials = (self._algorithm.encode(), certificates, secret)
        self._signer = self._made(None)
        self._timestamping = self._made(timestamp_url.encode()) if timestamp_url else None
        self._timestamps_from = clock()
        self._context = self._c2pa.Context.from_dict(_SETTINGS)
        self._check_signature(self._signer)

    def sign(self, file: bytes, content_type: str, parameters: str, delivered: bytes | None = None) -> bytes:
        """Return the file with a signed manifest; ``parameters`` is the JSON text in it.

        ``delivered`` is the file of a hosted generator: it becomes an ingredient if it has a manifest.
        Raises RunFailed if that is impossible, as once the certificate has expired.
        """
        if self._now() > self._valid_until.timestamp():
            raise RunFailed(f"{_CERTIFICATE_OPTION}: the certificate has expired; renew it")
        if self._timestamping is not None and self._clock() >= self._timestamps_from:
            arguments = (self._timestamping, file, content_type, parameters, delivered)
            try:
                return run_with_timeout(_TIMESTAMP_TIMEOUT, partial(self._signed, *arguments))
            except (TimeoutError, self._c2pa.C2paError) as exc:
                self._timestamps_from = self._clock() + _TIMESTAMP_PAUSE
                log.warning("no time stamp (%s); signing without for %g s", _one_line(exc), _TIMESTAMP_PAUSE)
        try:
            return self._signed(self._signer, file, content_type, parameters, delivered)
        except self._c2pa.C2paError as exc:
            raise RunFailed(f"an image cannot be signed: {_one_line(exc)}") from exc

    def check_timestamps(self) -> str:
        """Sign a small image with a time stamp, if there is a service; return what signs, in words.

        Raises ConfigurationError if the service fails.
        """
        words = f"{self.name} ({self._algorithm.upper()}), until {self._valid_until:%Y-%m-%d}"
        if self._timestamping is None:
            return f"{words}; without time stamps"
        try:
            run_with_timeout(_TIMESTAMP_TIMEOUT, partial(self._check_signature, self._timestamping))
        except TimeoutError as exc:
            raise ConfigurationError(f"{_URL_OPTION}: {exc}") from exc
        return f"{words}; with time stamps"

    def _made(self, timestamp_url: bytes | None) -> Any:
        try:
            return self._c2pa.Signer.from_info(self._c2pa.C2paSignerInfo(*self._credentials, timestamp_url))
        except self._c2pa.C2paError as exc:
            raise ConfigurationError(f"{_CERTIFICATE_OPTION}: {_one_line(exc)}") from exc

    def _signed(
        self, signer: Any, file: bytes, content_type: str, parameters: str, delivered: bytes | None
    ) -> bytes:
        signed = io.BytesIO()
        with self._parent(parameters, delivered) or self._builder(parameters, _CREATED) as builder:
            builder.sign(signer, content_type, io.BytesIO(file), signed)
        return signed.getvalue()

    def _parent(self, parameters: str, delivered: bytes | None) -> Any:
        """Return a builder with the delivered file as the parent; None if it has no readable manifest."""
        if delivered is None or not holds_manifest(delivered):
            return None
        content_type = next(
            (kind for magic, kind in _MAGIC.items() if delivered.startswith(magic)), "image/webp"
        )
        builder = self._builder(parameters, _OPENED)
        try:
            builder.add_ingredient(json.dumps(_INGREDIENT), content_type, io.BytesIO(delivered))
        except self._c2pa.C2paError as exc:
            builder.close()
            log.warning(
                "the generator's own C2PA manifest cannot be read (%s); it is left out", _one_line(exc)
            )
            return None
        return builder

    def _builder(self, parameters: str, actions: Sequence[Mapping[str, object]]) -> Any:
        values = json.loads(parameters)
        generation = {
            "model": values.get("model"),
            "revision": values.get("revision"),
            "parameters_sha256": hashlib.sha256(parameters.encode()).hexdigest(),
        }
        definition = {
            "claim_generator_info": [_AGENT],
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": actions}},
                {"label": _GENERATION, "data": generation},
            ],
        }
        return self._c2pa.Builder(json.dumps(definition), self._context)

    def _check_signature(self, signer: Any) -> None:
        """Sign a small image and verify it; raise ConfigurationError if either fails."""
        from PIL import Image

        small = io.BytesIO()
        Image.new("RGB", (8, 8)).save(small, "PNG")
        try:
            signed = self._signed(signer, small.getvalue(), "image/png", "{}", None)
        except self._c2pa.C2paError as exc:
            option = _CERTIFICATE_OPTION if signer is self._signer else _URL_OPTION
            hint = f"; {_PROFILE}" if signer is self._signer else ""
            raise ConfigurationError(f"{option}: c2pa cannot sign with it ({_one_line(exc)}){hint}") from exc
        manifest = read_manifest(signed, "image/png")
        if manifest["state"] not in {"Valid", "Trusted"}:
            codes = ", ".join(manifest["failures"])
            raise ConfigurationError(f"{_CERTIFICATE_OPTION}: what it signs does not hold ({codes})")


_CERTIFICATE_OPTION: Final = "--c2pa-certificate (C2PA_CERTIFICATE)"
_KEY_OPTION: Final = "--c2pa-key (C2PA_KEY)"
_URL_OPTION: Final = "--c2pa-timestamp-url (C2PA_TIMESTAMP_URL)"
_PROFILE: Final = "it must be no authority's, be for digital signatures, and have the usage emailProtection"
_TIMESTAMP_TIMEOUT: Final = 10.0  # seconds
_TIMESTAMP_PAUSE: Final = 60.0  # seconds without time stamps after a failure
_AGENT: Final = {"name": "text2img", "version": __version__}
_CREATED: Final = [{"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE, "softwareAgent": _AGENT}]
_INGREDIENT: Final = {"title": "delivered image", "relationship": "parentOf", "label": "delivered"}
_MAGIC: Final = {b"\x89PNG": "image/png", b"\xff\xd8": "image/jpeg"}
_OPENED: Final = [
    {
        "action": "c2pa.opened",
        "digitalSourceType": SOURCE_TYPE,
        "parameters": {"ingredientIds": [_INGREDIENT["label"]]},
    },
    {"action": "c2pa.converted", "softwareAgent": _AGENT},
]


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:200]


def _pem(option: str, value: str) -> bytes:
    """Return PEM text, whose line ends may be written as in a variable, or the content of a file."""
    if "-----BEGIN" in value:
        return value.replace("\\n", "\n").encode()
    try:
        return expand_home(value, option).read_bytes()
    except (OSError, ValueError) as exc:
        reason = (exc.strerror if isinstance(exc, OSError) else None) or "it is neither PEM nor a path"
        raise ConfigurationError(f"{option}: the file cannot be read: {reason}") from None


def _certificates(pem: bytes) -> tuple[list[x509.Certificate], bytes]:
    """Return the certificates, and their PEM without what is between them."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        chain = x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ConfigurationError(f"{_CERTIFICATE_OPTION} contains no certificates in PEM") from None
    return chain, b"".join(each.public_bytes(Encoding.PEM) for each in chain)


def _check_chain(chain: Sequence[x509.Certificate], now: datetime) -> None:
    """Raise ConfigurationError for certificates out of order, expired, or not valid yet."""
    from cryptography.exceptions import InvalidSignature

    for number, certificate in enumerate(chain, 1):
        which = f"{_CERTIFICATE_OPTION}: certificate {number} of {len(chain)} ({_subject(certificate)})"
        if certificate.not_valid_after_utc < now:
            raise ConfigurationError(
                f"{which} expired on {certificate.not_valid_after_utc:%Y-%m-%d}; renew it"
            )
        if certificate.not_valid_before_utc > now:
            raise ConfigurationError(
                f"{which} is valid only from {certificate.not_valid_before_utc:%Y-%m-%d}"
            )
        if number == len(chain):
            return
        try:
            certificate.verify_directly_issued_by(chain[number])
        except (ValueError, TypeError, InvalidSignature):
            raise ConfigurationError(
                f"{which} was not issued by the one that follows, {_subject(chain[number])}; give the chain"
                " in order, each certificate followed by its issuer"
            ) from None


def _key(pem: bytes, certificate: x509.Certificate) -> tuple[str, bytes]:
    """Return c2pa's name of the algorithm, and the key as PKCS #8."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    try:
        key = serialization.load_pem_private_key(pem, None)
    except TypeError:
        raise ConfigurationError(f"{_KEY_OPTION} is encrypted; give it without a passphrase") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigurationError(f"{_KEY_OPTION} contains no private key in PEM") from None
    curve = key.curve.name if isinstance(key, ec.EllipticCurvePrivateKey) else None
    algorithm = {"secp256r1": "es256", "secp384r1": "es384"}.get(curve or "")
    algorithm = "ps256" if isinstance(key, rsa.RSAPrivateKey) else algorithm
    algorithm = "ed25519" if isinstance(key, ed25519.Ed25519PrivateKey) else algorithm
    if algorithm is None:
        raise ConfigurationError(f"{_KEY_OPTION} is for another algorithm; use P-256, P-384, RSA or Ed25519")
    if key.public_key() != certificate.public_key():
        raise ConfigurationError(
            f"{_KEY_OPTION} is not the key of the first certificate, {_subject(certificate)}"
        )
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return algorithm, key.private_bytes(*form)


def _subject(certificate: x509.Certificate) -> str:
    from cryptography.x509.oid import NameOID

    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else certificate.subject.rfc4514_string()
