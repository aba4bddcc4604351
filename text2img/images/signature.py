"""A font's file: which characters it holds, and its letters at a size. Knows no picture and no signature.

Which characters a font holds stands in its table ``cmap`` (OpenType 1.9.1; formats 4 and 12, which are all
that Unicode fonts of our days use). FreeType reads the same table, yet Pillow does not pass on what it found:
it draws a box for what is missing.
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


USUAL: Final = 18
"""The letters' em is this part of the picture's shorter side, but at least SMALL."""
SMALL: Final = 14
"""Pixels: what small pictures are signed with."""
LEAST: Final = 8
"""Pixels: names that do not fit are drawn smaller, down to this em; below it nobody could read them."""
MARGIN: Final = 0.4
"""Between the signature and the picture's edges, in ems."""
EQUAL: Final = 0.179
"""The luminance that has the same contrast ratio, 4.6, with black and with white (WCAG 2.2)."""
UNSEEN: Final = frozenset("\u200c\u200d\u200e\u200f")
"""Joiners and direction marks: they steer the layout and need no glyph."""
_JOINED: Final = (range(0x0590, 0x10A0), range(0x1700, 0x1CC0), range(0xA840, 0xA880))
"""Scripts (Hebrew … Myanmar, Tagalog … Ol Chiki, Phags-pa) whose letters change with their neighbours."""


@dataclass(frozen=True, slots=True)
class _Letters:
    """A name at a size: the masks (L) of its letters and of letters and outline together, equally large."""

    em: int
    ink: Image.Image
    whole: Image.Image

    @property
    def margin(self) -> int:
        return max(2, round(self.em * MARGIN))

    def fits(self, width: int, height: int) -> bool:
        """Whether they and their margins have room in a picture of that size."""
        return self.whole.width + 2 * self.margin <= width and self.whole.height + 2 * self.margin <= height


class Signer:
    """Draws names with one font: the bundled DejaVu Sans Bold, or the one in the file ``font``.

    Without ``shaping`` (None: whether Pillow finds the libraries for it) it draws only scripts whose letters
    stand one after the other. Safe to use from several threads.
    """

    def __init__(self, font: str | None = None, *, shaping: bool | None = None) -> None:
        self._path = Path(font) if font else BUNDLED
        self._shaping = shaping

    @cached_property
    def font(self) -> Font:
        """The font; raises ConfigurationError where its file is none."""
        shaping = features.check("raqm") if self._shaping is None else self._shaping
        return Font(self._path, shaping=bool(shaping))

    def check(self, name: str, width: int, height: int) -> None:
        """Raise PromptFailed (``invalid_parameters``) unless such a picture can be signed, to be read."""
        self._letters(name, width, height)

    def sign(self, image: Image.Image, name: str, position: str, opacity: int) -> Image.Image:
        """A copy of the picture (RGB) with the name in its ``bottom-right`` or ``bottom-left`` corner.

        ``opacity`` is in [0, 255]: 0 leaves every pixel as it is, 255 hides what is below the letters.
        Raises PromptFailed as ``check`` does.
        """
        letters = self._letters(name, *image.size)
        left = letters.margin
        if position == "bottom-right":
            left = image.width - letters.margin - letters.whole.width
        top = image.height - letters.margin - letters.whole.height
        corner = (left, top, left + letters.whole.width, top + letters.whole.height)
        light = _luminance(image.crop(corner), letters.whole) < EQUAL
        colours = Image.new("L", letters.whole.size, 0 if light else 255)
        colours.paste(255 if light else 0, mask=letters.ink)
        signed = image.copy()
        covered = letters.whole.point([level * opacity // 255 for level in range(256)])
        signed.paste(colours.convert("RGB"), corner, covered)
        return signed

    def _letters(self, name: str, width: int, height: int) -> _Letters:
        """The name as large as it shall be, or as it can be."""
        text = unicodedata.normalize("NFC", name)
        self._check_drawable(text)
        em = max(SMALL, min(width, height) // USUAL)
        while not (letters := _drawn(text, em, self.font.sized(em))).fits(width, height):
            if em == LEAST:
                raise _refused(
                    f"artist_name is too long for a picture of {width}×{height}: its letters would be under"
                    f" {LEAST} pixels high, which nobody can read; shorten it or make the picture larger"
                )
            room = min(width / letters.whole.width, height / letters.whole.height)
            em = max(LEAST, min(em - 1, int(em * room)))
        return letters

    def _check_drawable(self, text: str) -> None:
        if unicodedata.category(text[:1] or " ").startswith("M"):
            raise _refused("artist_name begins with a combining mark, which has no letter to stand on")
        for char in text:
            if char not in UNSEEN and not self._holds(char):
                shown = f"{char} (U+{ord(char):04X})" if char.isprintable() else f"U+{ord(char):04X}"
                raise _refused(
                    f"artist_name holds {shown}, which the font {self.font.name} cannot draw; leave it out,"
                    " or have --signature-font name a font that can"
                )
            if not self.font.shaping and _needs_shaping(char):
                raise _refused(
                    "artist_name is in a script that is drawn right to left, joined or with marks; for that"
                    " Pillow needs libfribidi, which this machine lacks; install it"
                )

    def _holds(self, char: str) -> bool:
        """Whether the font holds the character or, where they are put together, its parts."""
        parts = unicodedata.normalize("NFD", char)
        return self.font.holds(char) or (self.font.shaping and all(map(self.font.holds, parts)))


def _drawn(text: str, em: int, font: FreeTypeFont) -> _Letters:
    """The name's masks, cut to what can be seen of them; raises PromptFailed where nothing can."""
    outline = max(1, round(em / 8))
    left, top, right, bottom = font.getbbox(text, stroke_width=outline, anchor="ls")
    # Marks may reach beyond the box that Pillow tells.
    size, start = (int(right - left) + 2 * em, int(bottom - top) + 2 * em), (em - left, em - top)
    ink, whole = Image.new("L", size), Image.new("L", size)
    ImageDraw.Draw(ink).text(start, text, 255, font, "ls")
    if ink.getbbox() is None:
        raise _refused("artist_name has nothing that can be seen; write a name, or leave it out")
    ImageDraw.Draw(whole).text(start, text, 255, font, "ls", stroke_width=outline, stroke_fill=255)
    seen = whole.getbbox()
    return _Letters(em, ink.crop(seen), whole.crop(seen))


def _luminance(image: Image.Image, mask: Image.Image) -> float:
    """The mean relative luminance (WCAG 2.2: sRGB made linear, 0 … 1) of what lies under the mask."""
    levels = np.asarray(image, np.float64) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    return float(np.average(linear @ (0.2126, 0.7152, 0.0722), weights=np.asarray(mask)))


def _needs_shaping(char: str) -> bool:
    right_to_left = unicodedata.bidirectional(char) in {"R", "AL", "AN"}
    mark = unicodedata.category(char).startswith("M") or char in UNSEEN
    return right_to_left or mark or any(ord(char) in script for script in _JOINED)


def _refused(message: str) -> PromptFailed:
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, message)
