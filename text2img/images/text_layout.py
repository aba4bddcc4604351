"""Texts of any kind on a page: what cannot be drawn is replaced, lines are broken to measure, and what finds
no room is cut, with an ellipsis that says so. Knows no page.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from functools import cache
from typing import TYPE_CHECKING, Final

from PIL import Image, ImageDraw, features

from text2img.images.signature import BUNDLED, UNSEEN, Font

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

MISSING: Final = "\ufffd"
"""Stands where a character does that the font lacks, or that is none."""
ELLIPSIS: Final = "…"
LONGEST: Final = 2000
"""Characters of a text that are looked at: more than any page has room for."""


class TextLayout:
    """Draws lines of text with the bundled font, its em ``size`` pixels. For one thread."""

    def __init__(self, size: int) -> None:
        self._sized: FreeTypeFont = _font().sized(size)
        self.height: Final = round(1.35 * size)
        """From one line to the next, in pixels."""

    def width(self, line: str) -> float:
        """How many pixels a line takes."""
        return self._sized.getlength(line)

    def lines(self, text: str, width: int, most: int) -> list[str]:
        """The text in at most ``most`` lines of at most ``width`` pixels, broken at spaces where there are
        any; the last one ends in an ellipsis where that is not all of it.
        """
        rest, lines = drawable(text), list[str]()
        while rest and len(lines) < most - 1:
            line = self._first_line(rest, width)
            lines.append(line.rstrip())
            rest = rest[len(line) :].lstrip()
        return [*lines, self.cut(rest, width)] if rest else lines

    def cut(self, line: str, width: int) -> str:
        """The line itself, or as much of it as ``width`` pixels hold, and an ellipsis."""
        if self._fitting(line, width) == len(line):
            return line
        room = width - self.width(ELLIPSIS)
        return line[: self._fitting(line, room)].rstrip() + ELLIPSIS

    def draw(self, page: Image.Image, at: tuple[int, int], line: str, colour: str) -> None:
        """Draw a line, ``at`` its left top corner; marks piled higher than a line are cut off."""
        mask = Image.new("L", (round(self.width(line)) + self.height, self.height))
        ImageDraw.Draw(mask).text((0, 0), line, 255, self._sized)
        page.paste(Image.new("RGB", mask.size, colour), at, mask)

    def _first_line(self, text: str, width: int) -> str:
        end = max(1, self._fitting(text, width))
        space = text.rfind(" ", 1, end + 1)
        return text if end == len(text) else text[: space if space > 0 else end]

    def _fitting(self, text: str, width: float) -> int:
        """How many of its first characters are at most ``width`` pixels wide."""
        lengths = range(1, min(len(text), max(0, int(width))) + 1)
        return bisect_right(lengths, width, key=lambda length: self.width(text[:length]))


def drawable(text: str) -> str:
    """One line that the bundled font can draw, whatever the text is.

    White space and control characters become a space, marks of formatting go (those that turn the direction
    around would carry a line's words elsewhere), and what the font lacks is MISSING.
    """
    kept = text if len(text) <= LONGEST else text[:LONGEST] + ELLIPSIS
    composed = unicodedata.normalize("NFC", kept)
    return " ".join("".join(map(_drawable, composed)).split())


def _drawable(char: str) -> str:
    category = unicodedata.category(char)
    if category in {"Cc", "Zs", "Zl", "Zp"}:
        return " "
    if category == "Cf" and char not in UNSEEN:
        return ""
    return char if _font().holds(char) else MISSING


@cache
def _font() -> Font:
    return Font(BUNDLED, shaping=bool(features.check("raqm")))
