"""C2PA through the whole job: what is stored, recorded, kept at a second try, and refused before a claim."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.acceptance import product
from tests.marks import Authority, exiftool, key_pem
from tests.servers.fal import KEY, MODEL, painted
from text2img.images.provenance import ManifestSigner, State, inspect

CAPTION = "a large red circle on a white background"
JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))
OURS, OTHERS = Authority(), Authority("Another root", "p256-other")
SIGN = {"C2PA_CERTIFICATE": OURS.chain(), "C2PA_KEY": key_pem("p256")}
SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
FORMATS = ("png", "jpeg", "webp")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The folder after a signed run: a prompt of two images for each format, drawn with a signature."""
    folder = tmp_path_factory.mktemp("signed")
    for name, text in SIGN.items():
        (folder / f"{name}.pem").write_text(text)
    product.add(
        folder, *({"id": kind, "text": CAPTION, "image_format": kind, "num_images": 2} for kind in FORMATS)
    )
    signing = {f"{name}_FILE": str(folder / f"{name}.pem") for name in SIGN}
    finished = product.sleeping.run(*JOB, "--artist-name", "Studio 9", folder=folder, **signing)
    assert finished.returncode == 0, finished.stderr
    return folder


def _rows(folder):
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        database.row_factory = sqlite3.Row
        return {row["_id"]: dict(row) for row in database.execute("SELECT * FROM datasets")}


def test_every_image_is_signed_and_its_hash_is_the_signed_file_s(outcome):
    """Both images of each format hold, under the authority's root; sha256 is of the bytes that are stored."""
    for row in _rows(outcome).values():
        urls = json.loads(row["image_urls"])
        assert len(urls) == 2
        for url in urls:
            data = Path(url).read_bytes()
            marks = inspect(data, OURS.root)
            assert (marks.state, marks.manifest["model"]) == (State.TRUSTED, str(product.MODEL)), marks
            if url == row["image_url"]:
                assert row["sha256"] == hashlib.sha256(data).hexdigest()


def test_exiftool_reads_the_xmp_of_signed_images(outcome):
    """Beside the manifest, the XMP of each stored image says what made it; no warning."""
    files = sorted((outcome / "pictures").iterdir())
    for tags in exiftool(*files):
        assert tags["XMP:DigitalSourceType"] == SOURCE
        assert tags["XMP:CreatorTool"].startswith("text2img ")
        assert not {tag for tag in tags if tag.endswith((":Warning", ":Error"))}


def test_a_second_try_keeps_the_stored_file_and_records_its_hash(outcome):
    """Where a worker died between upload and record, the other signature of the next one changes nothing."""
    before = {path.name: path.read_bytes() for path in (outcome / "pictures").iterdir()}
    recorded = {name: row["sha256"] for name, row in _rows(outcome).items()}
    with closing(sqlite3.connect(outcome / "prompts.db")) as database, database:
        database.execute("UPDATE datasets SET status = 'pending', sha256 = NULL, sha256s = NULL")
    again = product.sleeping.run(*JOB, "--artist-name", "Studio 9", folder=outcome, **SIGN)
    assert again.stdout.startswith("completed 3 (6 images), failed 0"), again.stderr
    assert {path.name: path.read_bytes() for path in (outcome / "pictures").iterdir()} == before
    assert {name: row["sha256"] for name, row in _rows(outcome).items()} == recorded


WRONG = {
    "another key": ({**SIGN, "C2PA_KEY": key_pem("p256-another")}, "--c2pa-key (C2PA_KEY) is not the key of"),
    "two roots": (
        {**SIGN, "C2PA_CERTIFICATE": OURS.leaf() + OTHERS.root},
        "was not issued by the one that follows",
    ),
    "expired": ({**SIGN, "C2PA_CERTIFICATE": OURS.chain(days=(-9, -1))}, "expired on "),
    "no key": ({"C2PA_CERTIFICATE": OURS.chain()}, "--c2pa-key (C2PA_KEY); give both"),
}


def test_what_cannot_sign_is_status_2_before_the_first_claim(tmp_path):
    """One line that names the option, no key in it, and the prompt as it was; doctor says the same."""
    product.add(tmp_path, CAPTION)
    job = ("run", "--database", f"sqlite:///{tmp_path}/prompts.db", *JOB[2:])
    flags = {"C2PA_CERTIFICATE": "--c2pa-certificate", "C2PA_KEY": "--c2pa-key"}
    commands = [
        (*job, *(word for name, value in variables.items() for word in (flags[name], value)))
        for variables, _ in WRONG.values()
    ]
    for done, (_, words) in zip(product.run_each(commands, tmp_path), WRONG.values(), strict=True):
        assert done.returncode == 2, done.stderr
        (line,) = product.errors(done)
        assert words in line
        assert "PRIVATE KEY" not in line
    assert product.counts(tmp_path) == {"pending": 1}
    variables, words = WRONG["another key"]
    told = product.sleeping.run("doctor", *JOB, folder=tmp_path, **variables)
    (failed,) = [line for line in told.stdout.splitlines() if "FAILED" in line]
    assert failed.startswith("manifest ")
    assert words in failed
    assert product.sleeping.run("doctor", *JOB, folder=tmp_path, **SIGN).returncode == 0


def test_what_fal_signed_is_the_parent_of_the_stored_image(tmp_path, fal):
    """A delivered image's own manifest stays as an ingredient; one without a manifest was created here."""
    signer = ManifestSigner(OTHERS.chain("p384"), key_pem("p384"))
    delivered = signer.sign(painted(1, (128, 64)), "image/png", "{}")
    fal.plan("a signed boat", image=delivered)
    texts = {"signed": "a signed boat", "plain": "a plain boat"}
    product.add(tmp_path, *({"id": name, "text": text} for name, text in texts.items()))
    hosted = ("--generator", f"fal:{MODEL}", "--width", "128", "--height", "64")
    variables = {**SIGN, "FAL_KEY": KEY, "GENERATOR_URL": fal.url}
    finished = product.run(*JOB[:4], *hosted, folder=tmp_path, **variables)
    assert finished.returncode == 0, finished.stderr
    marks = {name: inspect((tmp_path / "pictures" / f"{name}.png").read_bytes(), OURS.root) for name in texts}
    assert {name: each.state for name, each in marks.items()} == dict.fromkeys(texts, State.TRUSTED)
    assert marks["signed"].manifest["actions"] == ["c2pa.opened", "c2pa.converted"]
    assert marks["signed"].manifest["ingredients"] == ["delivered image"]
    assert marks["plain"].manifest["actions"] == ["c2pa.created"]
    assert marks["plain"].xmp["AISystemUsed"] == f"fal:{MODEL}"
