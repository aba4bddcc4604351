"""PNG, JPEG and WebP: pixels, parameters, and the bytes between them."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from text2img.images import FORMATS, encode, read_parameters
from text2img.prompts.parameters import FORMATS as WORDS
from text2img.prompts.parameters import MAX_TEXT_CHARS

NOISE = Image.fromarray(np.random.default_rng(7).integers(0, 256, (24, 40, 3), dtype=np.uint8))
_SLOPE = np.linspace(0, 255, 96, dtype=np.uint8)
SMOOTH = Image.fromarray(np.stack([np.tile(_SLOPE, (64, 1))] * 3, axis=2))

NO_TEXT = [chr(0xDC00 + byte) for byte in range(0x80, 0x100)]
"""How Python says bytes of a folder's name that are no text."""


def _file(kind: str, parameters=None, quality=None, image=NOISE) -> bytes:
    return encode(image, parameters or {}, FORMATS[kind], quality)


def _distance(file: bytes, image: Image.Image) -> float:
    """Levels by which the file's pixels are off, on average."""
    with Image.open(io.BytesIO(file)) as read:
        return float(np.abs(np.asarray(read, float) - np.asarray(image, float)).mean())


def test_every_format_that_can_be_asked_for_can_be_written() -> None:
    """The words that a prompt may say are the formats there are."""
    assert tuple(FORMATS) == WORDS


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_is_what_its_name_says(kind: str) -> None:
    """The file is of the format asked for, in RGB, of the same size; ending and content type are its own."""
    with Image.open(io.BytesIO(_file(kind))) as read:
        assert (read.format, read.mode, read.size) == (kind.upper(), "RGB", (40, 24))
        assert read.get_format_mimetype() == FORMATS[kind].content_type
        assert FORMATS[kind].ending in {".png", ".jpg", ".webp"}
        assert Image.registered_extensions()[FORMATS[kind].ending] == read.format


@pytest.mark.parametrize(("kind", "quality"), [("png", None), ("png", 10), ("webp", None)])
def test_png_and_webp_lose_nothing(kind: str, quality: int | None) -> None:
    """Every pixel comes back, of a PNG at any quality and of a WebP that none is asked of."""
    assert _distance(_file(kind, quality=quality), NOISE) == 0


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_quality_is_size_and_likeness(kind: str) -> None:
    """The better the quality asked for, the larger the file and the closer to the pixels."""
    files = [_file(kind, quality=quality, image=SMOOTH) for quality in (5, 50, 100)]
    assert all(len(worse) < len(better) for worse, better in pairwise(files))
    distances = [_distance(file, SMOOTH) for file in files]
    assert distances[0] > distances[-1]
    assert distances[-1] < 1


def test_a_jpeg_is_of_quality_95_with_all_its_colours() -> None:
    """Without a wish it is the one at 95, and its colours are not halved in resolution."""
    assert _file("jpeg") == _file("jpeg", quality=95)
    with Image.open(io.BytesIO(_file("jpeg"))) as read:
        assert {layer[1:3] for layer in read.layer} == {(1, 1)}


@pytest.mark.parametrize("kind", FORMATS)
@given(text=st.text(max_size=100) | st.text(NO_TEXT, min_size=1, max_size=9))
def test_any_text_survives_in_the_file(kind: str, text: str) -> None:
    """Whatever text the parameters hold, the file gives it back letter by letter."""
    assert read_parameters(_file(kind, {"prompt": text, "seed": 2**63 - 1})) == {
        "prompt": text,
        "seed": 2**63 - 1,
    }


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_programs_for_generated_pictures_find_the_comment(kind: str) -> None:
    """It stands as they write it themselves: a big-endian TIFF, and UTF-16 in the same order."""
    file = _file(kind, {"prompt": "Zoë"})
    assert b"Exif\0\0MM\0*" in file if kind == "jpeg" else b"EXIF" in file
    assert b"UNICODE\0" + '{"prompt": "Zoë"}'.encode("utf-16-be") in file


@pytest.mark.parametrize("kind", FORMATS)
def test_the_longest_prompts_survive_in_the_file(kind: str) -> None:
    """Texts as long as they may be, four bytes a letter, come back whole, and so do the pixels."""
    longest = {"prompt": "🦊" * MAX_TEXT_CHARS, "negative_prompt": "水" * MAX_TEXT_CHARS}
    file = _file(kind, longest)
    assert read_parameters(file) == longest
    assert _distance(file, NOISE) == _distance(_file(kind), NOISE)


@pytest.mark.parametrize(("length", "segments"), [(1, 1), (32_700, 1), (32_800, 2), (131_000, 4)])
def test_a_jpeg_begins_as_readers_expect(length: int, segments: int) -> None:
    """JFIF's segment stands first, then EXIF's, one where one is enough, then XMP's; none is too large."""
    file, place, markers = _file("jpeg", {"prompt": "x" * length}), 2, []
    assert file[:2] == b"\xff\xd8"
    while file[place + 1] in {0xE0, 0xE1}:
        size = int.from_bytes(file[place + 2 : place + 4])
        markers.append((file[place + 1], file[place + 4 : place + 8]))
        place += 2 + size
    assert file[place : place + 2] == b"\xff\xdb"  # the tables that come next in any JPEG
    assert markers == [(0xE0, b"JFIF")] + [(0xE1, b"Exif")] * segments + [(0xE1, b"http")]
