"""A font's file: which characters it holds, and its letters at a size. Knows no picture and no signature.

Which characters a font holds stands in its table ``cmap`` (OpenType 1.9.1; formats 4 and 12, which are all
that Unicode fonts of our days use). FreeType reads the same table, yet Pillow does not pass on what it found:
it draws a box for what is missing.
"""

from __future__ import annotations

import io
import struct
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from PIL import ImageFont

from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

BUNDLED: Final = Path(__file__).parent / "fonts" / "DejaVuSans-Bold.ttf"
_UNICODE: Final = ((3, 10), (0, 6), (0, 4), (3, 1), (0, 3), (0, 2), (0, 1), (0, 0))
"""Platform and encoding of the maps by Unicode, those that reach beyond its first plane first."""


class Font:
    """A TrueType or OpenType font, read once; of a collection the first.

    ``shaping``: letters are laid out by HarfBuzz (right to left, joined, with their marks), not one after
    the other. Raises ConfigurationError for a file that is no such font. Safe to use from several threads.
    """

    def __init__(self, path: Path, *, shaping: bool) -> None:
        self.name, self.shaping = path.name, shaping
        try:
            self._data = path.read_bytes()
            self.sized(20).getmask("x")
            readable = bool(self._characters)
        except OSError as exc:
            reason = exc.strerror or "it is no font that can be drawn at any size"
            raise ConfigurationError(f"the font {path} cannot be read: {reason}") from exc
        except (struct.error, ValueError):
            readable = False
        if not readable:
            raise ConfigurationError(f"the font {path} does not say which characters it holds; take another")

    @property
    def size(self) -> int:
        """How many characters it holds."""
        return len(self._characters)

    def holds(self, char: str) -> bool:
        """Whether the font has a glyph for the character, other than the one for what is missing."""
        return ord(char) in self._characters

    def sized(self, pixels: int) -> ImageFont.FreeTypeFont:
        """The font with an em of so many pixels; a new object each time, as no two threads may share one."""
        engine = ImageFont.Layout.RAQM if self.shaping else ImageFont.Layout.BASIC
        return ImageFont.truetype(io.BytesIO(self._data), pixels, layout_engine=engine)

    @cached_property
    def _characters(self) -> frozenset[int]:
        start = _table(self._data, b"cmap")
        if start is None:
            return frozenset()
        (count,) = struct.unpack_from(">H", self._data, start + 2)
        records = struct.iter_unpack(">HHL", self._data[start + 4 : start + 4 + 8 * count])
        maps = {(platform, encoding): start + offset for platform, encoding, offset in records}
        best = next((maps[kind] for kind in _UNICODE if kind in maps), None)
        return frozenset() if best is None else frozenset(_mapped(self._data, best))


def _table(font: bytes, tag: bytes) -> int | None:
    """Where a table begins; None where the font has none of that name."""
    start = struct.unpack_from(">L", font, 12)[0] if font[:4] == b"ttcf" else 0
    (count,) = struct.unpack_from(">H", font, start + 4)
    records = struct.iter_unpack(">4sLLL", font[start + 12 : start + 12 + 16 * count])
    return next((offset for name, _, offset, _ in records if name == tag), None)


def _mapped(font: bytes, start: int) -> Iterator[int]:
    """The characters that the map at ``start`` gives a glyph other than 0, the one for what is missing."""
    (kind,) = struct.unpack_from(">H", font, start)
    if kind == 4:
        return _segments(font, start)
    if kind == 12:
        return _groups(font, start)
    return iter(())


def _segments(font: bytes, start: int) -> Iterator[int]:
    """Format 4: segments of characters, whose glyphs are counted on or looked up."""
    twice = struct.unpack_from(">H", font, start + 6)[0]  # two bytes a segment
    columns = (start + 14, start + 16 + twice, start + 16 + 2 * twice, start + 16 + 3 * twice)
    for place in range(0, twice, 2):
        last, first, delta, offset = (struct.unpack_from(">H", font, at + place)[0] for at in columns)
        for char in range(first, min(last, 0xFFFE) + 1):
            glyph = char
            if offset:
                at = columns[3] + place + offset + 2 * (char - first)
                glyph = struct.unpack_from(">H", font, at)[0] or -delta
            if (glyph + delta) & 0xFFFF:
                yield char


def _groups(font: bytes, start: int) -> Iterator[int]:
    """Format 12: groups of characters whose glyphs are counted on."""
    (count,) = struct.unpack_from(">L", font, start + 12)
    for first, last, glyph in struct.iter_unpack(">LLL", font[start + 16 : start + 16 + 12 * count]):
        yield from range(first if glyph else first + 1, min(last, 0x10FFFF) + 1)
