"""XMP in images, as exiftool reads it: every format, every setting, texts of all kinds."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.marks import exiftool
from text2img.errors import ConfigurationError
from text2img.images import (
    FORMATS,
    Duplicate,
    Marking,
    check_statement,
    encode,
    read_parameters,
    read_xmp,
)
from text2img.prompts.parameters import MAX_TEXT_CHARS

SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
IMAGE = Image.fromarray(np.random.default_rng(7).integers(0, 256, (24, 40, 3), dtype=np.uint8))
PARAMETERS = {
    "prompt": "a <red> boat & 水",
    "negative_prompt": "fog",
    "seed": 7,
    "model": "owner/model",
    "revision": "abc123",
    "software": "text2img 9.9",
}
FULL = Marking(creator="Ana Díaz <ana@example>", rights="© 2026 Ana & Co.\nAll rights reserved", prompt=True)
MARKINGS = {"plain": Marking(), "full": FULL, "no prompt": Marking(prompt=False)}


def _file(kind: str, marking=None, **changes) -> bytes:
    return encode(IMAGE, PARAMETERS | changes, FORMATS[kind], None, marking)


def _xmp(file: bytes) -> dict[str, str]:
    with Image.open(io.BytesIO(file)) as image:
        return read_xmp(image.info["xmp"])


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """What exiftool reads of a file of each format and marking, in one process of it."""
    folder, names = tmp_path_factory.mktemp("xmp"), []
    for kind, file_format in FORMATS.items():
        for name, marking in MARKINGS.items():
            path = folder / f"{name}{file_format.ending}"
            path.write_bytes(_file(kind, marking))
            names.append((kind, name, path))
    found = exiftool(*(path for _, _, path in names))
    return {(kind, name): tags for (kind, name, _), tags in zip(names, found, strict=True)}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", MARKINGS)
def test_exiftool_reads_what_made_the_image(read, kind: str, name: str) -> None:
    """Source type, program, model and revision stand in each file, whatever the settings; no warning."""
    tags = read[kind, name]
    assert tags["XMP:DigitalSourceType"] == SOURCE
    assert tags["XMP:CreatorTool"] == "text2img 9.9"
    assert tags["XMP:AISystemUsed"] == "owner/model"
    assert str(tags["XMP:AISystemVersionUsed"]) == "abc123"
    assert not {tag for tag in tags if tag.endswith((":Warning", ":Error"))}


@pytest.mark.parametrize("kind", FORMATS)
def test_exiftool_reads_creator_rights_and_prompt_where_they_are_given(read, kind: str) -> None:
    """They stand letter by letter in the files that are to hold them, and in no other."""
    full, plain = read[kind, "full"], read[kind, "plain"]
    assert full["XMP:Creator"] in (FULL.creator, [FULL.creator])
    assert full["XMP:Rights"] == FULL.rights
    assert full["XMP:AIPromptInformation"] == "a <red> boat & 水\nNegative prompt: fog"
    assert {"XMP:Creator", "XMP:Rights", "XMP:AIPromptInformation"}.isdisjoint(plain)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_prompt_is_where_the_setting_wants_it(kind: str) -> None:
    """Unset: in the parameters alone; yes: in XMP too; no: nowhere in the bytes."""
    for marking, embedded, in_xmp in (
        (None, True, False),
        (FULL, True, True),
        (MARKINGS["no prompt"], False, False),
    ):
        file = _file(kind, marking, prompt="a crimson dinghy", negative_prompt="drizzle")
        parameters, xmp = read_parameters(file), _xmp(file)
        assert ("prompt" in parameters, "negative_prompt" in parameters) == (embedded, embedded)
        assert ("AIPromptInformation" in xmp) is in_xmp
        assert parameters["seed"] == 7
        if not embedded:
            assert b"dinghy" not in file.replace(b"\0", b"")  # EXIF's text is UTF-16
            assert b"drizzle" not in file.replace(b"\0", b"")


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_image_is_the_same_bytes(kind: str) -> None:
    """No date and no random number is in it."""
    assert _file(kind, FULL) == _file(kind, FULL)


@given(text=st.text(max_size=80), rights=st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_text_makes_well_formed_xmp(text: str, rights: str) -> None:
    """Control characters and lone surrogates become U+FFFD; all else comes back as it was."""
    marking = Marking(creator=text, rights=rights, prompt=True)
    found = read_xmp(marking.xmp({"prompt": text, "model": text}))
    assert found["DigitalSourceType"] == SOURCE
    assert set(found) <= {
        *("DigitalSourceType", "CreatorTool", "AISystemUsed", "AIPromptInformation", "creator", "rights"),
    }
    if text.strip() == text and text.isprintable() and text:
        assert found["AIPromptInformation"] == found["AISystemUsed"] == found["creator"] == text


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("letter", ["x", "&", "水", "🦊", "\x01"])
def test_the_longest_prompts_leave_a_file_that_programs_read(kind: str, letter: str, tmp_path) -> None:
    """What does not fit into a JPEG's segment is cut from XMP, with an ellipsis; the parameters are whole."""
    longest = {"prompt": letter * MAX_TEXT_CHARS, "negative_prompt": letter * MAX_TEXT_CHARS}
    file = _file(kind, FULL, **longest)
    found = _xmp(file)
    assert found["AIPromptInformation"][:9_000] == (longest["prompt"][:9_000].replace("\x01", "\ufffd"))
    assert found["rights"] == FULL.rights
    assert read_parameters(file)["prompt"] == longest["prompt"]
    assert len(FULL.xmp(PARAMETERS | longest)) <= 65_502


@pytest.mark.parametrize(
    "packet",
    [b"", b"no XML", b"<x", b"\xff\xfe", b'<!DOCTYPE x [<!ENTITY a "b">]><x>&a;</x>', b"<x>" * 100_000],
)
def test_what_is_no_xmp_is_refused(packet: bytes) -> None:
    """Broken and hostile packets raise ValueError, and nothing else."""
    with pytest.raises(ValueError):  # noqa: PT011 - its message depends on the packet
        read_xmp(packet)


def test_xmp_that_another_program_wrote_is_read() -> None:
    """Adobe's programs write plain statements as attributes, and others links as resources."""
    packet = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:i="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" i:AISystemUsed="m">'
        f'<i:DigitalSourceType rdf:resource="{SOURCE}"/></rdf:Description></rdf:RDF></x:xmpmeta>'
    )
    assert read_xmp(packet.encode()) == {"AISystemUsed": "m", "DigitalSourceType": SOURCE}


def test_creator_and_rights_are_checked() -> None:
    """A text that XMP cannot hold, and one without end, is refused and names its option."""
    assert check_statement("--creator", "  Ana ") == "Ana"
    assert check_statement("--creator", " ") is None
    for wrong in ("A\x07na", "x" * 2_001):
        with pytest.raises(ConfigurationError, match=r"^--rights "):
            check_statement("--rights", wrong)


@pytest.mark.parametrize("kind", FORMATS)
def test_without_its_prompt_an_image_is_known_by_its_pixels(kind: str) -> None:
    """With --provenance-prompt no, equal parameters and pixels are the same image; other pixels are not."""
    marking = MARKINGS["no prompt"]
    duplicate = Duplicate(_file(kind, marking))
    rounded = Image.fromarray(np.where(np.arange(40)[:, None] % 8 == 0, np.asarray(IMAGE) ^ 1, IMAGE))
    other = Image.fromarray(255 - np.asarray(IMAGE))
    assert duplicate.matches(encode(rounded, PARAMETERS, FORMATS[kind], None, marking))
    assert not duplicate.matches(encode(other, PARAMETERS, FORMATS[kind], None, marking))
    assert not duplicate.matches(_file(kind, marking, seed=8))
    assert not duplicate.matches(_file(kind))  # it holds the prompt that is to be left out
