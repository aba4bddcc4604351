"""Which characters a font holds, and what is bundled."""

from __future__ import annotations

import struct
import unicodedata
from typing import TYPE_CHECKING

import pytest
from PIL import Image, ImageDraw

from text2img.errors import ConfigurationError
from text2img.images.signature import BUNDLED, Font, _mapped_chars

if TYPE_CHECKING:
    from pathlib import Path

FONT = Font(BUNDLED, shaping=False)
MISSING = "\U0010fffe"
"""No character: what a font draws for it, it draws for whatever it lacks."""


def _look(char: str) -> bytes:
    image = Image.new("L", (60, 60))
    ImageDraw.Draw(image).text((20, 40), char, 255, FONT.sized(24), "ls")
    return image.tobytes()


def test_what_the_bundled_font_holds_is_what_it_draws() -> None:
    """Of thousands of characters, those that it does not hold look like a missing one, and no other does."""
    box = _look(MISSING)
    chars = [chr(code) for code in (*range(0x20, 0x3400), *range(0xFB00, 0xFE00), *range(0x1F600, 0x1F650))]
    chars = [char for char in chars if unicodedata.category(char) not in {"Cc", "Cf", "Zl", "Zp"}]
    wrong = [char for char in chars if FONT.holds(char) == (_look(char) == box)]
    assert wrong == []
    held = sum(map(FONT.holds, chars))
    assert 4_000 < held < len(chars) - 4_000


def test_the_bundled_font_is_small_and_comes_with_its_licence() -> None:
    """It takes no more than 800 KB, and the licence beside it names its makers."""
    assert BUNDLED.stat().st_size <= 800_000
    licence = (BUNDLED.parent / "LICENSE").read_text(encoding="utf-8")
    for words in (BUNDLED.name, "Bitstream Vera Fonts Copyright", "Arev Fonts Copyright"):
        assert words in licence


def _format_4() -> bytes:
    """A, B as 5, 6 by their distance; a, b, c as 0 (missing), 9, 8 by a list; the end, as the format asks."""
    ends, starts = (0x42, 0x63, 0xFFFF), (0x41, 0x61, 0xFFFF)
    deltas, offsets = ((5 - 0x41) & 0xFFFF, 1, 1), (0, 4, 0)
    head = struct.pack(">7H", 4, 46, 0, 6, 4, 1, 2)
    return head + struct.pack(">3HH3H3H3H3H", *ends, 0, *starts, *deltas, *offsets, 0, 8, 7)


def _format_12() -> bytes:
    """A, B as 0 (missing), 1, and the fox as 7."""
    return struct.pack(">HHLLL6L", 12, 0, 40, 0, 2, 0x41, 0x42, 0, 0x1F98A, 0x1F98A, 7)


@pytest.mark.parametrize(
    ("table", "held"),
    [
        (_format_4(), "ABbc"),
        (_format_12(), "B\U0001f98a"),
        (struct.pack(">HHH", 6, 0, 0), ""),
    ],
    ids=["format 4", "format 12", "another"],
)
def test_a_character_map_is_read_as_it_is_written(table: bytes, held: str) -> None:
    """Characters count that have a glyph other than the first, the one for what is missing."""
    assert sorted(_mapped_chars(b"....." + table, 5)) == [ord(char) for char in held]


def test_a_font_that_hides_what_it_holds_is_refused(tmp_path: Path) -> None:
    """Without a character map by Unicode nobody can tell what would be boxes."""
    data = BUNDLED.read_bytes()
    (tmp_path / "odd.ttf").write_bytes(data.replace(b"cmap", b"cmaq", 1))
    with pytest.raises(ConfigurationError, match=r"does not list its characters|cannot be read"):
        Font(tmp_path / "odd.ttf", shaping=False)


@pytest.mark.parametrize("cut", [11, 200, 5_000])
def test_half_a_font_is_refused(tmp_path: Path, cut: int) -> None:
    """A file that ends too early is wrong configuration, not a crash."""
    (tmp_path / "half.ttf").write_bytes(BUNDLED.read_bytes()[:cut])
    with pytest.raises(ConfigurationError):
        Font(tmp_path / "half.ttf", shaping=False)
