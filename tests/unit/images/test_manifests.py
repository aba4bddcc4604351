"""C2PA manifests: signed by every kind of key, read by c2pa, and found broken by any change."""

from __future__ import annotations

import io
import json

import c2pa
import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from PIL import Image
from werkzeug import Response

from tests.marks import NOW, Authority, key_pem, private_key, stamped
from text2img.errors import ConfigurationError, RunFailed
from text2img.images import FORMATS, Duplicate, Encoder, Marking
from text2img.images.provenance import ManifestSigner, State, inspect
from text2img.prompts import RequestedParameters
from text2img.prompts.parameters import resolve_parameters
from text2img.reports.gallery.page import thumbnail

PIXELS = np.random.default_rng(7).integers(0, 256, (64, 96, 3), dtype=np.uint8)
SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
OURS, OTHERS = Authority(), Authority("Another root", "p256-other")
PARAMETERS = {
    "prompt": "a boat",
    "seed": 7,
    "model": "owner/model",
    "revision": "abc",
    "software": "text2img 9.9",
}
KINDS = {"p256": "Es256", "p384": "Es384", "rsa2048": "Ps256", "ed25519": "Ed25519"}


def _encoder(kind: str = "p256", marking: Marking | None = None) -> Encoder:
    return Encoder(None, marking, ManifestSigner(OURS.chain(kind), key_pem(kind)))


def _signed(encoder: Encoder, image_format: str = "png", delivered: bytes | None = None, **changes) -> bytes:
    wanted = RequestedParameters(
        num_inference_steps=5, guidance_scale=3, width=96, height=64, image_format=image_format
    )
    parameters = PARAMETERS | changes
    file = encoder.encode(PIXELS, resolve_parameters((wanted,), seed=1), parameters)
    return encoder.sign(file, parameters, delivered).data


@pytest.fixture(scope="module")
def encoder():
    """An encoder that signs with the P-256 key."""
    return _encoder()


@pytest.fixture(scope="module")
def files(encoder):
    """A signed file of each format."""
    return {kind: _signed(encoder, kind) for kind in FORMATS}


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_c2pa_reads_what_each_kind_of_key_signs(kind: str, image_format: str) -> None:
    """The manifest says created, by which program and model, with the algorithm of the key; it holds."""
    file = _signed(_encoder(kind), image_format)
    with c2pa.Reader(FORMATS[image_format].content_type, io.BytesIO(file)) as reader:
        store = json.loads(reader.json())
    active = store["manifests"][store["active_manifest"]]
    assertions = {each["label"]: each["data"] for each in active["assertions"]}
    (action,) = assertions["c2pa.actions.v2"]["actions"]
    assert store["validation_state"] == "Valid"
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", SOURCE)
    assert action["softwareAgent"]["name"] == "text2img"
    assert assertions["text2img.generation"]["model"] == "owner/model"
    assert active["signature_info"]["alg"] == KINDS[kind]
    assert "thumbnail" not in active
    with Image.open(io.BytesIO(file)) as image:
        assert image.size == (96, 64)


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_private_authority_is_valid_and_one_among_the_anchors_is_trusted(files, image_format: str) -> None:
    """Who trusts the root sees trusted; everyone else sees valid."""
    assert inspect(files[image_format]).state is State.VALID
    assert inspect(files[image_format], OTHERS.root).state is State.VALID
    marks = inspect(files[image_format], OURS.root)
    assert marks.state is State.TRUSTED
    assert marks.manifest["signer"] == "Studio 9"
    assert marks.parameters["seed"] == 7
    assert marks.xmp["DigitalSourceType"] == SOURCE


@pytest.mark.parametrize("image_format", FORMATS)
def test_one_bit_changed_is_found(files, image_format: str) -> None:
    """Anywhere in the pixels, texts and the signed claim, and nearly anywhere in a manifest's framing."""
    file = files[image_format]
    start = file.index(b"jumb")
    random = np.random.default_rng(1)
    outside = [place for place in random.integers(0, len(file), 40) if not -40 < place - start < 3_600]
    inside = random.integers(start, start + 3_400, 40)
    missed = [place for place in inside if inspect(_flipped(file, place)).state is not State.BROKEN]
    assert [inspect(_flipped(file, place)).state for place in outside] == [State.BROKEN] * len(outside)
    assert len(missed) <= 2  # 15 of 3,400 bytes: lengths and headers that no reader needs


def _flipped(file: bytes, place: int) -> bytes:
    changed = bytearray(file)
    changed[place] ^= 1 << int(place) % 8
    return bytes(changed)


def test_signing_again_gives_other_bytes_that_count_as_the_same_image(encoder) -> None:
    """The parameters in the files decide, with the prompt and without it."""
    first, second = _signed(encoder), _signed(encoder)
    assert first != second
    assert Duplicate(first).matches(second)
    assert not Duplicate(first).matches(_signed(encoder, seed=8))
    silent = _encoder(marking=Marking(prompt=False))
    first, second = _signed(silent), _signed(silent)
    assert first != second
    assert b"a boat" not in first
    assert Duplicate(first).matches(second)
    assert inspect(first).state is State.VALID


def test_parameters_of_another_image_are_found(files, encoder) -> None:
    """A manifest names the SHA-256 of the parameters in its file."""
    assert (
        inspect(files["png"]).manifest["parameters_sha256"]
        != inspect(_signed(encoder, seed=8)).manifest["parameters_sha256"]
    )


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_delivered_manifest_becomes_an_ingredient(files, encoder, image_format: str) -> None:
    """What a hosted generator signed is kept as the parent; a broken one is kept as such, or left out."""
    marks = inspect(_signed(encoder, image_format, files["webp"]))
    assert marks.state is State.VALID
    assert marks.manifest["ingredients"] == ["delivered image"]
    assert marks.manifest["source_type"] == SOURCE
    torn = files["webp"].replace(b"c2pa.created", b"c2pa.edited!")
    for delivered in (torn, files["png"][:4000], b"\0" * 10):
        assert inspect(_signed(encoder, image_format, delivered)).state is State.VALID


def test_an_image_without_metadata_has_no_mark(files) -> None:
    """Saved again by a program that drops them, it says so in a sentence; XMP alone is unsigned."""
    stripped = io.BytesIO()
    with Image.open(io.BytesIO(files["png"])) as image:
        image.info = {}
        image.save(stripped, "PNG")
    marks = inspect(stripped.getvalue())
    assert marks.state is State.UNMARKED
    assert "they were removed" in marks.reason
    assert inspect(_signed(Encoder())).state is State.UNSIGNED


WRONG = {
    "another key": (OURS.chain(), key_pem("p256-another"), "is not the key of the first certificate"),
    "two roots": (OURS.leaf() + OTHERS.root, key_pem("p256"), "was not issued by the one that follows"),
    "reversed": (OURS.root + OURS.leaf(), key_pem("p256-root"), "was not issued by the one that follows"),
    "expired": (OURS.chain(days=(-9, -1)), key_pem("p256"), "certificate 1 of 2 (Studio 9) expired on "),
    "not yet": (OURS.chain(days=(1, 9)), key_pem("p256"), "is valid only from "),
    "no purpose": (OURS.chain(usage=None), key_pem("p256"), "have the usage emailProtection"),
    "an authority": (OURS.root, key_pem("p256-root"), "it must be no authority's"),
    "weak": (OURS.chain("rsa1024"), key_pem("rsa1024"), "c2pa cannot sign with it"),
    "other curve": (OURS.chain("p521"), key_pem("p521"), "use P-256, P-384, RSA or Ed25519"),
    "no certificate": (key_pem("p256"), key_pem("p256"), "contains no certificates"),
    "no key": (OURS.chain(), OURS.leaf(), "contains no private key"),
    "no file": ("/nowhere.pem", key_pem("p256"), "the file cannot be read: No such file"),
    "no path": ("x\0y", key_pem("p256"), "the file cannot be read: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_sign_is_found_at_once(name: str) -> None:
    """One line names the option and what is wrong with it, and never the key."""
    certificate, key, words = WRONG[name]
    with pytest.raises(ConfigurationError, match=r"^--c2pa-") as refused:
        ManifestSigner(certificate, key)
    assert words in str(refused.value)
    assert "PRIVATE" not in str(refused.value)


def test_a_key_may_come_as_its_tool_wrote_it(tmp_path) -> None:
    """From a file, with escaped line ends as in a variable, and in OpenSSL's older form."""
    old = private_key("p256").private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    (tmp_path / "key.pem").write_bytes(old)
    (tmp_path / "chain.pem").write_text("subject=Studio 9\n" + OURS.chain())
    for key in (str(tmp_path / "key.pem"), key_pem("p256").replace("\n", "\\n")):
        assert ManifestSigner(str(tmp_path / "chain.pem"), key).name == "Studio 9"


def test_a_time_stamp_is_in_the_signature(httpserver, tmp_path) -> None:
    """Its service's time is the signature's; doctor's check says that there are time stamps."""
    httpserver.expect_request("/", method="POST").respond_with_handler(
        lambda request: Response(
            stamped(request.data, tmp_path, OTHERS), content_type="application/timestamp-reply"
        )
    )
    signer = ManifestSigner(OURS.chain(), key_pem("p256"), httpserver.url_for("/"))
    assert signer.check_timestamps().endswith("; with time stamps")
    marks = inspect(_signed(Encoder(None, None, signer)))
    assert marks.state is State.VALID
    assert str(marks.manifest["time"]).startswith("20")
    assert len(httpserver.log) == 2


def test_a_time_stamping_service_that_fails_costs_the_stamps_and_no_image(httpserver, caplog) -> None:
    """The image is signed without; the service is asked again a minute later; doctor says what is wrong."""
    httpserver.expect_request("/").respond_with_data("busy", status=503)
    moment = [0.0]
    signer = ManifestSigner(OURS.chain(), key_pem("p256"), httpserver.url_for("/"), clock=lambda: moment[0])
    encoder = Encoder(None, None, signer)
    for now, requests in ((0.0, 1), (59.0, 1), (61.0, 2)):
        moment[0] = now
        marks = inspect(_signed(encoder))
        assert (marks.state, marks.manifest["time"], len(httpserver.log)) == (State.VALID, None, requests)
    assert caplog.text.count("no time stamp (") == 2
    with pytest.raises(ConfigurationError, match=r"^--c2pa-timestamp-url .* c2pa cannot sign with it"):
        signer.check_timestamps()


def test_a_certificate_that_expires_while_it_is_used_ends_the_run() -> None:
    """An image whose signature would never hold is not stored."""
    moments = [NOW.timestamp(), NOW.timestamp() + 31 * 86_400]
    signer = ManifestSigner(OURS.chain(), key_pem("p256"), now=lambda: moments[0])
    moments.pop(0)
    with pytest.raises(RunFailed, match="has expired"):
        signer.sign(b"", "image/png", "{}")


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_report_s_mark_needs_no_c2pa(files, image_format: str) -> None:
    """C2PA where there is a manifest, XMP where a model is said to have made it, else none."""
    assert thumbnail(files[image_format]).mark == "C2PA"
    assert thumbnail(_signed(Encoder(), image_format)).mark == "XMP"
    plain = io.BytesIO()
    Image.fromarray(PIXELS).save(plain, image_format)
    assert thumbnail(plain.getvalue()).mark is None
