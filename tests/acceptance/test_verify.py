"""``verify``: what it says of images of a run, whole, changed, stripped, replaced and foreign."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image, PngImagePlugin

from tests.acceptance import product
from tests.marks import Authority, key_pem

CAPTION = "a large red circle on a white background"
OURS = Authority()
SIGN = {"C2PA_CERTIFICATE": OURS.chain(), "C2PA_KEY": key_pem("p256")}
FORMATS = ("png", "jpeg", "webp")
DAMAGE = {
    "stripped.png": ("no mark", "they were removed, or another program made it"),
    "older.png": ("no mark", "made it without a mark, or its XMP was removed"),
    "cut.png": ("broken", "it is not a whole image"),
    "text.png": ("broken", "it is not a whole image"),
    "bit.jpg": ("broken", "its manifest does not hold: assertion.dataHash.mismatch"),
    "plain.png": ("unsigned", "its XMP declares that a model made it; it is not signed"),
    "missing.png": ("unreadable", "No such file"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder after a signed run, ``first``, and one without a certificate, ``second``."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "root.pem").write_text(OURS.root)
    signed = [{"id": kind, "text": CAPTION, "image_format": kind, "num_images": 2} for kind in FORMATS]
    job = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))
    for run, prompts, variables in (
        ("first", signed, SIGN),
        ("second", [{"id": "plain", "text": CAPTION}], {}),
    ):
        product.add(folder, *prompts)
        done = product.sleeping.run(*job, "--run-id", run, folder=folder, **variables)
        assert done.returncode == 0, done.stderr
    return folder


def _damage(folder):
    """Make one file of each kind of damage out of the signed images."""
    data = (folder / "png.png").read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        parameters, plain = image.info["parameters"], image.copy()
    plain.info = {}
    plain.save(folder / "stripped.png")
    older = PngImagePlugin.PngInfo()
    older.add_itxt("parameters", parameters)
    plain.save(folder / "older.png", pnginfo=older)
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("no image")
    middle = bytearray((folder / "jpeg.jpg").read_bytes())
    middle[-100] ^= 1
    (folder / "bit.jpg").write_bytes(middle)


@pytest.fixture(scope="module")
def told(made, tmp_path_factory):
    """What ``verify`` answers to every command line of this file, by its name."""
    pictures, copy = made / "pictures", tmp_path_factory.mktemp("copy")
    database, output = ("--database", f"sqlite:///{made}/prompts.db"), ("--output", str(pictures))
    trust, file = ("--c2pa-trust-anchors", str(made / "root.pem")), str(pictures / "png.png")
    _damage(pictures)
    before = {
        "trusted": ("--run-id", "first", *database, *output, *trust, "--json"),
        "valid": ("--run-id", "first", *database, *output, "--json"),
        "unsigned": ("--run-id", "second", *database, *output, "--json"),
        "lines": (file, *database, *trust),
        "damage": (*(str(pictures / name) for name in DAMAGE), file, "--json"),
        "bucket": ("s3://other/7.png", *output, "--json"),
        "elsewhere": ("--run-id", "first", *database, "--output", str(copy), "--json"),
        "nothing": (),
        "both": (file, "--run-id", "first"),
        "no output": ("--run-id", "first", *database),
        "no run": ("--run-id", "nowhere", *database, *output),
        "no anchors": (file, "--c2pa-trust-anchors", "none.pem"),
    }
    after = {
        "replaced run": ("--run-id", "first", *database, *output, "--json"),
        "replaced file": (file, *database, "--json"),
        "replaced alone": (file, "--json"),
    }
    done = _each(before, copy)
    (pictures / "png.png").write_bytes((pictures / "webp.webp").read_bytes())
    (pictures / "webp.webp").unlink()
    return done | _each(after, copy)


def _each(commands, folder):
    place = folder / next(iter(commands))
    place.mkdir()
    given = [("verify", *arguments) for arguments in commands.values()]
    return dict(zip(commands, product.run_each(given, place), strict=True))


def _states(done):
    return {one["file"].rpartition("/")[2]: one["state"] for one in json.loads(done.stdout)["images"]}


def test_the_images_of_a_run_are_trusted_or_valid(told):
    """By the run's id: each with its hash; trusted under the root given, valid without, unsigned unsigned."""
    cases = [told[name] for name in ("trusted", "valid", "unsigned")]
    assert [one.returncode for one in cases] == [0, 0, 0], cases[0].stderr
    assert set(_states(told["trusted"]).values()) == {"trusted"}
    assert set(_states(told["valid"]).values()) == {"valid"}
    assert _states(told["unsigned"]) == {"plain.png": "unsigned"}
    document = json.loads(told["trusted"].stdout)
    assert (document["counts"], document["status"]) == ({"trusted": 6}, 0)
    for one in document["images"]:
        assert one["recorded"] is True
        assert one["xmp"]["AISystemUsed"] == one["parameters"]["model"] == one["manifest"]["model"]


def test_a_person_reads_a_line_for_each_image(made, told):
    """The verdict, and what XMP, manifest and parameters say below it; the counts come last."""
    first, *said, last = told["lines"].stdout.splitlines()
    assert told["lines"].returncode == 0
    words = "trusted: signed by Studio 9, under a trust anchor; its hash is the recorded one"
    assert first == f"{made}/pictures/png.png: {words}"
    assert [line.split(":")[0] for line in said] == ["  XMP", "  manifest", "  parameters"]
    assert last == "1 images: 1 trusted"


def test_each_kind_of_damage_has_its_sentence(told):
    """Status 3, one verdict for each file, in the order given; a good file beside them is none the worse."""
    assert told["damage"].returncode == 3, told["damage"].stderr
    assert list(_states(told["damage"])) == [*DAMAGE, "png.png"]
    images = json.loads(told["damage"].stdout)["images"]
    for one, (state, words) in zip(images, DAMAGE.values(), strict=False):
        assert one["state"] == state, one
        assert words in one["reason"]
    assert images[-1]["state"] == "valid"


def test_an_image_that_took_another_s_place_is_not_the_recorded_one(told):
    """It is signed and whole, and is broken all the same where the database has another hash for it."""
    cases = [told[name] for name in ("replaced run", "replaced file", "replaced alone")]
    assert [one.returncode for one in cases] == [3, 3, 0], cases[0].stderr
    states = _states(told["replaced run"])
    assert (states["png.png"], states["webp.webp"], states["jpeg.jpg"]) == ("broken", "unreadable", "valid")
    (image,) = json.loads(told["replaced file"].stdout)["images"]
    assert "not the image that the database records" in image["reason"]
    assert json.loads(told["replaced alone"].stdout)["images"][0]["recorded"] is None


def test_urls_are_those_of_the_configured_storage(told):
    """A bucket's URL is not read for a folder; nor is what a document names outside of the output."""
    assert told["bucket"].returncode == 3
    assert "is not in" in json.loads(told["bucket"].stdout)["images"][0]["reason"]
    assert set(_states(told["elsewhere"]).values()) == {"unreadable"}


WRONG = {
    "nothing": "give one of the two",
    "both": "give one of the two",
    "no output": "none of --gcs-bucket",
    "no run": "there is no run 'nowhere'",
    "no anchors": "--c2pa-trust-anchors (C2PA_TRUST_ANCHORS): the file",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_usage_is_status_2(told, name):
    """One line names what is missing."""
    assert told[name].returncode == 2
    assert WRONG[name] in told[name].stderr
