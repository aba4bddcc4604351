"""Which files count as the same image as a new one: those that say so, whole, and of the same size."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from text2img.images import FORMATS, Duplicate, encode, is_overview
from text2img.images.contact_sheet import Row, contact_sheets, histogram

RANDOM = np.random.default_rng(7)
PARAMETERS = {"prompt": "a boat", "seed": 7, "model": "m", "software": "text2img 9.9"}
KINDS = list(FORMATS)


def _file(kind="png", size=(24, 16), **changes):
    """A file of other pixels each time, with the parameters and the changes of them."""
    pixels = RANDOM.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    found = {name: value for name, value in (PARAMETERS | changes).items() if value is not None}
    return encode(Image.fromarray(pixels), found, FORMATS[kind], None)


def _png(text, size=(24, 16)):
    """A PNG whose ``parameters`` are that text."""
    mark = PngImagePlugin.PngInfo()
    mark.add_itxt("parameters", text)
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG", pnginfo=mark)
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_parameters_are_the_same_image(kind):
    """Other pixels (another GPU rounds differently) make no other image; its own pixels are handed out."""
    ours, other = _file(kind), _file(kind)
    duplicate = Duplicate(ours)
    assert ours != other
    assert duplicate.matches(other)
    with Image.open(io.BytesIO(other)) as image:
        assert (duplicate.pixels == np.asarray(image)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes", [{"prompt": "a ship"}, {"seed": 8}, {"model": None}, {"lora": []}, {"prompt": None}]
)
def test_any_other_parameter_is_another_image(kind, changes):
    """One that differs, is missing, or is there in addition."""
    assert not Duplicate(_file(kind)).matches(_file(kind, **changes))


def test_without_its_text_no_image_is_known():
    """Where images do not hold their prompt, equal parameters say nothing of what they show."""
    assert not Duplicate(_file(prompt=None)).matches(_file(prompt=None))


def test_another_version_may_have_made_it():
    """An upgrade between upload and record is a difference only where it is asked about."""
    duplicate, older = Duplicate(_file()), _file(software="text2img 0.1")
    assert not duplicate.matches(older)
    assert duplicate.matches(older, any_version=True)
    assert not duplicate.matches(_file(software="text2img 0.1", seed=8), any_version=True)


def test_another_size_or_format_is_another_image():
    """What the parameters say is checked against the file."""
    assert not Duplicate(_file()).matches(_file(size=(16, 24)))
    assert not Duplicate(_file()).matches(_file("webp"))


def _bomb():
    """A PNG that declares 60,000 × 60,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


HOSTILE = {
    "empty": b"",
    "text": b"family",
    "cut": _file()[:-200],
    "head alone": _file()[:60],
    "bomb": _bomb(),
    "no JSON": _png("a boat, steps: 20"),
    "deep": _png("[" * 100_000),
    "long number": _png('{"seed": ' + "7" * 10_000 + "}"),
    "no object": _png("[7]"),
    "null": _png("null"),
    "plain": _png(""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_else_is_there_is_no_match(name):
    """Files of any content are another image, and raise nothing."""
    assert not Duplicate(_file()).matches(HOSTILE[name])
    assert not Duplicate(_file()).matches(HOSTILE[name], any_version=True)
    assert not is_overview(HOSTILE[name])


def test_overviews_are_known_and_images_are_not():
    """Contact sheets and histograms carry a mark; images and other files have none."""
    (sheet,) = contact_sheets([Row("a boat", ())])
    assert is_overview(sheet)
    with Image.open(io.BytesIO(sheet)) as image:
        assert b"/compositeWithTrainedAlgorithmicMedia<" in image.info["xmp"]
    assert is_overview(histogram([0.5]))
    assert not is_overview(_file())
    assert not is_overview(_png(json.dumps(PARAMETERS)))
