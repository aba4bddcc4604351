"""Signatures on images: a name drawn in a corner, and the fonts that draw it.

A font's table ``cmap`` lists the characters it has (OpenType 1.9.1; formats 4 and 12, the only ones that
current Unicode fonts use). FreeType reads that table too, but Pillow does not expose it: it draws a box for a
missing character. docs/decisions/font-character-map.md explains why fontTools does not read it.
"""

from __future__ import annotations

import io
import struct
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from text2img.errors import ConfigurationError, ErrorCode, PromptFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.ImageFont import FreeTypeFont


BUNDLED: Final = Path(__file__).parent / "fonts" / "DejaVuSans-Bold.ttf"
_UNICODE_MAPS: Final = ((3, 10), (0, 6), (0, 4), (3, 1), (0, 3), (0, 2), (0, 1), (0, 0))
"""Platform and encoding of the Unicode maps; those that cover more than its first plane come first."""


class Font:
    """A TrueType or OpenType font, or the first of a collection, read once.

    ``shaping``: HarfBuzz lays out the letters (right to left, joined, with their marks); without it they are
    placed one after the other. Raises ConfigurationError for any other file. Safe to use from several
    threads.
    """

    def __init__(self, path: Path, *, shaping: bool) -> None:
        self.name, self.shaping = path.name, shaping
        try:
            self._data = path.read_bytes()
            self.sized(20).getmask("x")
            readable = bool(self._characters)
        except OSError as exc:
            reason = exc.strerror or "it is not a scalable font"
            raise ConfigurationError(f"the font {path} cannot be read: {reason}") from exc
        except (struct.error, ValueError):
            readable = False
        if not readable:
            raise ConfigurationError(f"the font {path} does not list its characters; use another font")

    @property
    def size(self) -> int:
        """The number of characters in the font."""
        return len(self._characters)

    def holds(self, char: str) -> bool:
        """Return True if the font has a glyph for the character, other than the one for missing ones."""
        return ord(char) in self._characters

    def sized(self, pixels: int) -> ImageFont.FreeTypeFont:
        """Return the font with an em of that many pixels: a new object, since threads may not share one."""
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
        best = next((maps[kind] for kind in _UNICODE_MAPS if kind in maps), None)
        return frozenset() if best is None else frozenset(_mapped_chars(self._data, best))


def _table(font: bytes, tag: bytes) -> int | None:
    """Return a table's offset, or None if the font has no table of that name."""
    start = struct.unpack_from(">L", font, 12)[0] if font[:4] == b"ttcf" else 0
    (count,) = struct.unpack_from(">H", font, start + 4)
    records = struct.iter_unpack(">4sLLL", font[start + 12 : start + 12 + 16 * count])
    return next((offset for name, _, offset, _ in records if name == tag), None)


def _mapped_chars(font: bytes, start: int) -> Iterator[int]:
    """Return the characters that the map at ``start`` gives a glyph other than 0, the missing one's."""
    (kind,) = struct.unpack_from(">H", font, start)
    if kind == 4:
        return _segments(font, start)
    if kind == 12:
        return _groups(font, start)
    return iter(())


def _segments(font: bytes, start: int) -> Iterator[int]:
    """Yield the characters of a map in format 4: segments whose glyphs are consecutive or in an array."""
    length = struct.unpack_from(">H", font, start + 6)[0]  # of a column: two bytes a segment
    columns = (start + 14, start + 16 + length, start + 16 + 2 * length, start + 16 + 3 * length)
    for row in range(0, length, 2):
        last, first, delta, offset = (struct.unpack_from(">H", font, at + row)[0] for at in columns)
        for char in range(first, min(last, 0xFFFE) + 1):
            glyph = char
            if offset:
                at = columns[3] + row + offset + 2 * (char - first)
                glyph = struct.unpack_from(">H", font, at)[0] or -delta
            if (glyph + delta) & 0xFFFF:
                yield char


def _groups(font: bytes, start: int) -> Iterator[int]:
    """Yield the characters of a map in format 12: groups whose glyphs are consecutive."""
    (count,) = struct.unpack_from(">L", font, start + 12)
    for first, last, glyph in struct.iter_unpack(">LLL", font[start + 16 : start + 16 + 12 * count]):
        yield from range(first if glyph else first + 1, min(last, 0x10FFFF) + 1)


EM_DIVISOR: Final = 18
"""The em is the image's shorter side divided by this, but at least DEFAULT_MIN_EM."""
DEFAULT_MIN_EM: Final = 14
"""Pixels: the em on small images."""
MIN_EM: Final = 8
"""Pixels: names that do not fit are drawn smaller, down to this em; smaller ones are unreadable."""
MARGIN_EMS: Final = 0.4
"""The distance between the signature and the image's edges, in ems."""
EQUAL_CONTRAST: Final = 0.179
"""The luminance with the same contrast ratio, 4.6, to black and to white (WCAG 2.2)."""
INVISIBLE_CHARS: Final = frozenset("\u200c\u200d\u200e\u200f")
"""Joiners and direction marks: they control the layout and need no glyph."""
_SHAPED_SCRIPTS: Final = (range(0x0590, 0x10A0), range(0x1700, 0x1CC0), range(0xA840, 0xA880))
"""Scripts (Hebrew … Myanmar, Tagalog … Ol Chiki, Phags-pa) whose letters change with their neighbours."""


@dataclass(frozen=True, slots=True)
class _Lettering:
    """A name drawn at one size: masks (L) of its letters, and of letters and outline, of equal size."""

    em: int
    ink: Image.Image
    outlined: Image.Image

    @property
    def margin(self) -> int:
        return max(2, round(self.em * MARGIN_EMS))

    def fits(self, width: int, height: int) -> bool:
        """Return True if the name and its margins fit into an image of that size."""
        margins = 2 * self.margin
        return self.outlined.width + margins <= width and self.outlined.height + margins <= height


class Signer:
    """A drawer of signatures in one font: the bundled DejaVu Sans Bold, or the file ``font``.

    Without ``shaping`` (None: if Pillow has the libraries for it) only scripts whose letters follow one
    another can be drawn. Safe to use from several threads.
    """

    def __init__(self, font: str | None = None, *, shaping: bool | None = None) -> None:
        self._path = Path(font) if font else BUNDLED
        self._shaping = shaping

    @cached_property
    def font(self) -> Font:
        """The font; raises ConfigurationError if its file is not a font."""
        shaping = features.check("raqm") if self._shaping is None else self._shaping
        return Font(self._path, shaping=bool(shaping))

    def check(self, name: str, width: int, height: int) -> None:
        """Raise PromptFailed (``invalid_parameters``) unless an image of that size can be signed readably."""
        self._fit(name, width, height)

    def sign(self, image: Image.Image, name: str, position: str, opacity: int) -> Image.Image:
        """Return a copy of the RGB image with the name in its ``bottom-right`` or ``bottom-left`` corner.

        ``opacity`` is in [0, 255], from invisible to opaque letters. Raises PromptFailed as ``check`` does.
        """
        lettering = self._fit(name, *image.size)
        left = lettering.margin
        if position == "bottom-right":
            left = image.width - lettering.margin - lettering.outlined.width
        top = image.height - lettering.margin - lettering.outlined.height
        corner = (left, top, left + lettering.outlined.width, top + lettering.outlined.height)
        light = _luminance(image.crop(corner), lettering.outlined) < EQUAL_CONTRAST
        colours = Image.new("L", lettering.outlined.size, 0 if light else 255)
        colours.paste(255 if light else 0, mask=lettering.ink)
        signed = image.copy()
        alpha = lettering.outlined.point([level * opacity // 255 for level in range(256)])
        signed.paste(colours.convert("RGB"), corner, alpha)
        return signed

    def _fit(self, name: str, width: int, height: int) -> _Lettering:
        """Return the name at its default size, or smaller until it fits into the image."""
        text = unicodedata.normalize("NFC", name)
        self._check_drawable(text)
        em = max(DEFAULT_MIN_EM, min(width, height) // EM_DIVISOR)
        while not (lettering := _render(text, em, self.font.sized(em))).fits(width, height):
            if em == MIN_EM:
                raise _invalid(
                    f"artist_name is too long for an image of {width}×{height}: its letters would be under"
                    f" {MIN_EM} pixels high and unreadable; shorten it or make the image larger"
                )
            room = min(width / lettering.outlined.width, height / lettering.outlined.height)
            em = max(MIN_EM, min(em - 1, int(em * room)))
        return lettering

    def _check_drawable(self, text: str) -> None:
        if unicodedata.category(text[:1] or " ").startswith("M"):
            raise _invalid("artist_name begins with a combining mark; put a letter before it")
        for char in text:
            if char not in INVISIBLE_CHARS and not self._holds(char):
                shown = f"{char} (U+{ord(char):04X})" if char.isprintable() else f"U+{ord(char):04X}"
                raise _invalid(
                    f"artist_name has {shown}, which the font {self.font.name} cannot draw; remove it, or"
                    " set --signature-font to a font that can"
                )
            if not self.font.shaping and _needs_shaping(char):
                raise _invalid(
                    "artist_name is in a script that is drawn right to left, joined or with marks; for that"
                    " Pillow needs libfribidi, which is missing here; install it"
                )

    def _holds(self, char: str) -> bool:
        """Return True if the font has the character or, with shaping, the parts it is composed of."""
        parts = unicodedata.normalize("NFD", char)
        return self.font.holds(char) or (self.font.shaping and all(map(self.font.holds, parts)))


def _render(text: str, em: int, font: FreeTypeFont) -> _Lettering:
    """Render the name's masks, cropped to what is visible; raise PromptFailed if nothing is."""
    outline = max(1, round(em / 8))
    left, top, right, bottom = font.getbbox(text, stroke_width=outline, anchor="ls")
    # Marks may extend beyond the box that Pillow reports.
    size, start = (int(right - left) + 2 * em, int(bottom - top) + 2 * em), (em - left, em - top)
    ink, outlined = Image.new("L", size), Image.new("L", size)
    ImageDraw.Draw(ink).text(start, text, 255, font, "ls")
    if ink.getbbox() is None:
        raise _invalid("artist_name has no visible characters; write a name or omit it")
    ImageDraw.Draw(outlined).text(start, text, 255, font, "ls", stroke_width=outline, stroke_fill=255)
    visible = outlined.getbbox()
    return _Lettering(em, ink.crop(visible), outlined.crop(visible))


def _luminance(image: Image.Image, mask: Image.Image) -> float:
    """Return the mean relative luminance (WCAG 2.2: linear sRGB, 0 … 1) of the pixels under the mask."""
    levels = np.asarray(image, np.float64) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    return float(np.average(linear @ (0.2126, 0.7152, 0.0722), weights=np.asarray(mask)))


def _needs_shaping(char: str) -> bool:
    right_to_left = unicodedata.bidirectional(char) in {"R", "AL", "AN"}
    mark = unicodedata.category(char).startswith("M") or char in INVISIBLE_CHARS
    return right_to_left or mark or any(ord(char) in script for script in _SHAPED_SCRIPTS)


def _invalid(message: str) -> PromptFailed:
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, message)
