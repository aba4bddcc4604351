"""Text layout for any text: line breaks by width, an ellipsis where it is cut, replaced characters."""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from functools import cache
from typing import TYPE_CHECKING, Final

from PIL import Image, ImageDraw, features

from text2img.images.signature import BUNDLED, INVISIBLE_CHARS, Font

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

REPLACEMENT: Final = "\ufffd"
"""Replaces characters that the font lacks, and invalid ones."""
ELLIPSIS: Final = "…"
MAX_TEXT_CHARS: Final = 2000
"""Longer texts are cut to this length first; no page has room for more."""


class TextLayout:
    """Layout and drawing of text lines in the bundled font, with an em of ``size`` pixels.

    Not safe to use from several threads.
    """

    def __init__(self, size: int) -> None:
        self._sized: FreeTypeFont = _font().sized(size)
        self.height: Final = round(1.35 * size)
        """The line height, in pixels."""

    def width(self, line: str) -> float:
        """Return a line's width, in pixels."""
        return self._sized.getlength(line)

    def lines(self, text: str, width: int, max_lines: int) -> list[str]:
        """Break the text into at most ``max_lines`` lines of at most ``width`` pixels, at spaces if possible.

        The last line ends in an ellipsis if the text is longer.
        """
        rest, lines = drawable(text), list[str]()
        while rest and len(lines) < max_lines - 1:
            line = self._first_line(rest, width)
            lines.append(line.rstrip())
            rest = rest[len(line) :].lstrip()
        return [*lines, self.cut(rest, width)] if rest else lines

    def cut(self, line: str, width: int) -> str:
        """Return the line, or as much of it as fits into ``width`` pixels with an ellipsis."""
        if self._count_fitting(line, width) == len(line):
            return line
        room = width - self.width(ELLIPSIS)
        return line[: self._count_fitting(line, room)].rstrip() + ELLIPSIS

    def draw(self, page: Image.Image, at: tuple[int, int], line: str, colour: str) -> None:
        """Draw a line with its top left corner ``at``; marks stacked higher than a line are cut off."""
        mask = Image.new("L", (round(self.width(line)) + self.height, self.height))
        ImageDraw.Draw(mask).text((0, 0), line, 255, self._sized)
        page.paste(Image.new("RGB", mask.size, colour), at, mask)

    def _first_line(self, text: str, width: int) -> str:
        end = max(1, self._count_fitting(text, width))
        space = text.rfind(" ", 1, end + 1)
        return text if end == len(text) else text[: space if space > 0 else end]

    def _count_fitting(self, text: str, width: float) -> int:
        """Return how many of the first characters fit into ``width`` pixels."""
        lengths = range(1, min(len(text), max(0, int(width))) + 1)
        return bisect_right(lengths, width, key=lambda length: self.width(text[:length]))


def drawable(text: str) -> str:
    """Return any text as one line that the bundled font can draw.

    White space and control characters become a space. Format characters are removed: those that reverse the
    direction would move a line's words. Characters that the font lacks become REPLACEMENT.
    """
    shortened = text if len(text) <= MAX_TEXT_CHARS else text[:MAX_TEXT_CHARS] + ELLIPSIS
    composed = unicodedata.normalize("NFC", shortened)
    return " ".join("".join(map(_drawable, composed)).split())


def _drawable(char: str) -> str:
    category = unicodedata.category(char)
    if category in {"Cc", "Zs", "Zl", "Zp"}:
        return " "
    if category == "Cf" and char not in INVISIBLE_CHARS:
        return ""
    return char if _font().holds(char) else REPLACEMENT


@cache
def _font() -> Font:
    return Font(BUNDLED, shaping=bool(features.check("raqm")))
