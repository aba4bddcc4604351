"""Text layout for any text: line breaks by width, an ellipsis where it is cut, replaced characters."""

from __future__ import annotations

import io
import math
import unicodedata
from array import array
from bisect import bisect_right
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from statistics import fmean, median
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError, features

from text2img.errors import Stopped
from text2img.images import open_image, overview_mark
from text2img.images.signature import BUNDLED, INVISIBLE_CHARS, Font

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray
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


ROWS_PER_PAGE: Final = 20
"""Image rows on a page. Together with COLUMNS it limits a page's memory, to some 25 MB."""
COLUMNS: Final = 6
"""Images in a row; a prompt with more candidates continues in the next row."""
IMAGE_SIDE, TEXT_WIDTH, MARGIN, FONT_SIZE, CAPTION_FONT_SIZE = 180, 260, 16, 14, 11  # pixels
_CAPTION_LINES: Final = 3
_GRID_TEXT_LINES: Final = 2
_PAPER, _INK, _FAINT, _FRAME, _BEST = "#ffffff", "#1a202c", "#5a6577", "#a0aec0", "#1c6b41"


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image that was generated for a prompt.

    ``iteration`` counts from 1; ``score`` is in [0, 1], or None; ``best`` marks the prompt's result.
    ``image`` returns the file's bytes when the page is drawn; an error it raises is shown in the image's
    place.
    """

    iteration: int
    seed: int
    score: float | None
    best: bool
    image: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt's text and its candidates, in order."""

    text: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class _RowSegment:
    """The part of a row that is drawn side by side: candidates from index ``start`` on, of ``total``.

    ``iterated``: the row has images of several iterations. ``scored``: one of its images has a score.
    """

    text: str
    candidates: tuple[Candidate, ...]
    start: int
    total: int
    iterated: bool = False
    scored: bool = False


def contact_sheets(rows: Iterable[Row], *, page: int = ROWS_PER_PAGE, grid: bool = False) -> Iterator[bytes]:
    """Yield pages as PNG bytes, each with at most ``page`` rows of images; no pages if there are no rows.

    With ``grid``, for prompts with one image each, a row has several prompts, each with its text below.
    Rows and their images are read while a page is drawn, so memory holds one page. A text or file that cannot
    be drawn is replaced. Only Stopped is raised, if reading an image raises it.
    """
    if grid:
        remaining = iter(rows)
        while cells := list(islice(remaining, page * COLUMNS)):
            yield _grid_page(cells)
        return
    segments = (segment for row in rows for segment in _segments(row))
    while segments_of_page := list(islice(segments, page)):
        yield _page(segments_of_page)


def _segments(row: Row) -> Iterator[_RowSegment]:
    iterated = any(candidate.iteration > 1 for candidate in row.candidates)
    scored = any(_is_scored(candidate) for candidate in row.candidates)
    for start in range(0, max(1, len(row.candidates)), COLUMNS):
        part = row.candidates[start : start + COLUMNS]
        yield _RowSegment(row.text, part, start, len(row.candidates), iterated, scored)


def _grid_page(cells: Sequence[Row]) -> bytes:
    """Draw a page of prompts with one image each, COLUMNS in a row."""
    small = TextLayout(CAPTION_FONT_SIZE)
    columns, step = min(COLUMNS, len(cells)), IMAGE_SIDE + MARGIN
    row_height = IMAGE_SIDE + (_GRID_TEXT_LINES + 2) * small.height + 2 * MARGIN
    size = (MARGIN + columns * step, -(-len(cells) // columns) * row_height + MARGIN)
    page = Image.new("RGB", size, _PAPER)
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        corner = (MARGIN + column * step, MARGIN + row * row_height)
        text = small.lines(cell.text, IMAGE_SIDE, _GRID_TEXT_LINES) or ["(no text)"]
        for candidate in cell.candidates[:1]:
            _draw_candidate(page, candidate, corner, small, [*text, *_caption(candidate)])
        if not cell.candidates:
            small.draw(page, corner, f"no image: {small.cut(text[0], IMAGE_SIDE - 60)}", _FAINT)
    return _as_png(page)


def _as_png(page: Image.Image) -> bytes:
    file = io.BytesIO()
    page.save(file, "PNG", pnginfo=overview_mark(shows_images=True))
    return file.getvalue()


def _page(segments: Sequence[_RowSegment]) -> bytes:
    normal, small = TextLayout(FONT_SIZE), TextLayout(CAPTION_FONT_SIZE)
    columns = max(len(segment.candidates) for segment in segments) or 1
    row_height = IMAGE_SIDE + _CAPTION_LINES * small.height + 2 * MARGIN
    size = (TEXT_WIDTH + 2 * MARGIN + columns * (IMAGE_SIDE + MARGIN), len(segments) * row_height)
    page = Image.new("RGB", size, _PAPER)
    for number, segment in enumerate(segments):
        top = number * row_height + MARGIN
        if number:
            ImageDraw.Draw(page).line((0, top - MARGIN, page.width, top - MARGIN), _FRAME)
        _draw_text(page, segment, top, (normal, small))
        for column, candidate in enumerate(segment.candidates):
            left = TEXT_WIDTH + 2 * MARGIN + column * (IMAGE_SIDE + MARGIN)
            iteration = [f"iteration {candidate.iteration}"] if segment.iterated else []
            caption = [*iteration, *_caption(candidate)]
            _draw_candidate(page, candidate, (left, top), small, caption)
            if candidate.best and segment.scored:
                _mark_best(page, (left, top), small)
    return _as_png(page)


def _draw_text(
    page: Image.Image, segment: _RowSegment, top: int, layouts: tuple[TextLayout, TextLayout]
) -> None:
    """Draw the prompt's text, cut to the row's height, and the range of its candidates."""
    normal, small = layouts
    lines = normal.lines(segment.text, TEXT_WIDTH, IMAGE_SIDE // normal.height) or ["(no text)"]
    for number, line in enumerate(lines):
        normal.draw(page, (MARGIN, top + number * normal.height), line, _INK)
    note = _note(segment)
    small.draw(page, (MARGIN, top + IMAGE_SIDE + small.height), note, _FAINT)


def _note(segment: _RowSegment) -> str:
    if segment.total == 0:
        return "no image"
    if segment.total <= COLUMNS:
        return ""
    return f"images {segment.start + 1}–{segment.start + len(segment.candidates)} of {segment.total:,}"


def _draw_candidate(
    page: Image.Image,
    candidate: Candidate,
    corner: tuple[int, int],
    layout: TextLayout,
    caption: Sequence[str],
) -> None:
    """Draw a candidate: its framed image, or the error in an empty frame, and its caption below."""
    left, top = corner
    try:
        image = thumbnail(candidate.image(), IMAGE_SIDE)
    except Stopped:
        raise
    except Exception as exc:  # noqa: BLE001 - an error in one image must not hide the others
        _draw_error(page, exc, corner, layout)
    else:
        page.paste(image, (left + (IMAGE_SIDE - image.width) // 2, top + (IMAGE_SIDE - image.height) // 2))
    frame = (left - 1, top - 1, left + IMAGE_SIDE, top + IMAGE_SIDE)
    ImageDraw.Draw(page).rectangle(frame, outline=_FRAME)
    for number, line in enumerate(caption):
        layout.draw(page, (left, top + IMAGE_SIDE + 8 + number * layout.height), line, _INK)


def _caption(candidate: Candidate) -> list[str]:
    score = [f"score {candidate.score:.3f}"] if _is_scored(candidate) else []
    return [f"seed {candidate.seed}", *score]


def _is_scored(candidate: Candidate) -> bool:
    return candidate.score is not None and math.isfinite(candidate.score)


def _mark_best(page: Image.Image, corner: tuple[int, int], layout: TextLayout) -> None:
    """Mark the best candidate with a thick frame and a label with a star."""
    left, top = corner
    draw, label = ImageDraw.Draw(page), "★ best"
    frame = (left - 5, top - 5, left + IMAGE_SIDE + 4, top + IMAGE_SIDE + 4)
    draw.rectangle(frame, outline=_BEST, width=5)
    right, bottom = left + round(layout.width(label)) + 10, top + layout.height + 3
    draw.rectangle((left - 5, top - 5, right, bottom), _BEST)
    layout.draw(page, (left + 2, top), label, _PAPER)


def _draw_error(page: Image.Image, exc: Exception, corner: tuple[int, int], layout: TextLayout) -> None:
    lines = layout.lines(
        f"cannot be shown: {str(exc) or type(exc).__name__}", IMAGE_SIDE - 12, IMAGE_SIDE // layout.height - 2
    )
    for number, line in enumerate(lines, 1):
        layout.draw(page, (corner[0] + 6, corner[1] + 6 + number * layout.height), line, _FAINT)


MAX_PIXELS: Final = 64_000_000
"""Larger images are not opened: a small file may declare more pixels than fit in memory."""
_WHITE: Final = "#ffffff"


def thumbnail(file: bytes, max_side: int) -> Image.Image:
    """Return the image as RGB, scaled so that its longer side has ``max_side`` pixels.

    Transparent pixels become white. Raises ValueError for a file that is not a readable PNG, JPEG or WebP,
    and for an image larger than MAX_PIXELS, which is not decoded.
    """
    with _opened(file) as image:
        image.draft("RGB", (2 * max_side, 2 * max_side))  # decode a JPEG at a fraction of its size
        scale = max_side / max(image.size)
        size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
        small = image.convert("RGBA").resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    flattened = Image.new("RGB", size, _WHITE)
    flattened.paste(small, mask=small)
    return flattened


def pixels(file: bytes) -> NDArray[np.uint8]:
    """Return the image's pixels, uint8 (height, width, 3), RGB; raises as ``thumbnail`` does."""
    with _opened(file) as image:
        return np.asarray(image.convert("RGB"))


@contextmanager
def _opened(file: bytes) -> Iterator[Image.Image]:
    """Open the image, of at most MAX_PIXELS; its decoder's errors, inside the block too, are ValueErrors."""
    try:
        with open_image(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError  # noqa: TRY301 - as Pillow does, at another limit
            yield image
    except UnidentifiedImageError:
        raise ValueError("it is not an image, or not PNG, JPEG or WebP") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"it declares more than {MAX_PIXELS:,} pixels, which is too many") from None
    except Exception as exc:
        reason = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
        raise ValueError(f"it cannot be decoded ({reason[:100]})") from exc


BINS: Final = 20
_WIDTH, _HEIGHT = 900, 560
_LEFT, _TOP, _RIGHT, _BOTTOM = 80, 110, 870, 490  # the axes, in pixels of the page
_MAX_TICKS: Final = 6  # on the vertical axis
_GRID, _BAR = "#e2e8f0", "#7fa6cc"
_POWERS_OF_TEN: Final[tuple[int, ...]] = tuple(10**power for power in range(13))
_SOLID, _DASHED, _DOTTED = (1, 0), (9, 5), (3, 4)  # pixels drawn, pixels left out


def histogram(scores: Iterable[float | None], *, min_score: float | None = None, bins: int = BINS) -> bytes:
    """Draw the histogram of the scores, with mean and median, as a PNG of 900 × 560 pixels.

    It has ``bins`` bars of equal width over [0, 1]. A bar includes its lower edge but not its upper one; the
    last includes 1. ``min_score`` is marked, with the number of scores that reach it. Images without a valid
    score (None, or a number outside [0, 1]) are counted in the heading.
    """
    values, unscored = array("d"), 0
    for score in scores:
        if score is not None and 0 <= score <= 1:
            values.append(score)
        else:
            unscored += 1
    page = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    _draw_title(page, values, unscored)
    _draw_bars(page, counts(values, bins))
    _draw_markers(page, list(_markers(values, min_score)))
    return _as_png(page)


def counts(scores: Iterable[float], bins: int) -> list[int]:
    """Count the scores, each in [0, 1], in each of ``bins`` parts of equal width."""
    totals = [0] * bins
    for score in scores:
        totals[min(bins - 1, int(score * bins))] += 1
    return totals


def _draw_title(page: Image.Image, values: Sequence[float], unscored: int) -> None:
    title = f"Scores of {len(values):,} images" if values else "No image has a score"
    TextLayout(18).draw(page, (_LEFT, 18), title, _INK)
    if unscored:
        TextLayout(12).draw(page, (_LEFT, 46), f"{unscored:,} without a score", _FAINT)


def _draw_bars(page: Image.Image, heights: Sequence[int]) -> None:
    """Draw the bars and the axes."""
    draw, layout = ImageDraw.Draw(page), TextLayout(12)
    step = _step(max(heights))
    ceiling = max(step, math.ceil(max(heights) / step) * step)
    for count in range(0, ceiling + 1, step):
        y = round(_BOTTOM - count / ceiling * (_BOTTOM - _TOP))
        draw.line((_LEFT, y, _RIGHT, y), _GRID)
        label = f"{count:,}"
        layout.draw(page, (_LEFT - 10 - round(layout.width(label)), y - 8), label, _FAINT)
    for index, count in enumerate(heights):
        left, right = _x(index / len(heights)), _x((index + 1) / len(heights))
        if count:
            top = min(_BOTTOM - 2, round(_BOTTOM - count / ceiling * (_BOTTOM - _TOP)))
            draw.rectangle((left + 1, top, right - 1, _BOTTOM), _BAR, outline=_INK)
    for tenth in range(11):
        label, x = f"{tenth / 10:.1f}", _x(tenth / 10)
        draw.line((x, _BOTTOM, x, _BOTTOM + 5), _INK)
        layout.draw(page, (x - round(layout.width(label) / 2), _BOTTOM + 9), label, _FAINT)
    draw.line((_LEFT, _BOTTOM, _RIGHT, _BOTTOM), _INK)
    layout.draw(page, (_x(0.5) - round(layout.width("score") / 2), _BOTTOM + 34), "score", _INK)
    layout.draw(page, (10, _TOP - 26), "images", _INK)


def _markers(
    values: Sequence[float], min_score: float | None
) -> Iterator[tuple[float, str, str, tuple[int, int]]]:
    """Yield each marker's score, label, colour and dashes."""
    if values:
        yield fmean(values), f"mean {fmean(values):.3f}", _INK, _SOLID
        yield median(values), f"median {median(values):.3f}", "#6b3fa0", _DASHED
    if min_score is not None and math.isfinite(min_score):
        reached = sum(value >= min_score for value in values)
        label = f"min score {min_score:.3f}, reached by {reached:,}"
        yield min(1.0, max(0.0, min_score)), label, "#b83232", _DOTTED


def _draw_markers(page: Image.Image, markers: Sequence[tuple[float, str, str, tuple[int, int]]]) -> None:
    """Draw the markers' lines, and their legend above the bars."""
    draw, layout, left = ImageDraw.Draw(page), TextLayout(12), _LEFT
    for score, label, colour, dashes in markers:
        _dash(draw, (_x(score), _TOP - 8), (0, 1), _BOTTOM - _TOP + 8, (colour, dashes))
        _dash(draw, (left, _TOP - 35), (1, 0), 34, (colour, dashes))
        layout.draw(page, (left + 42, _TOP - 43), label, _INK)
        left += 42 + round(layout.width(label)) + 28


def _dash(
    draw: ImageDraw.ImageDraw,
    start: tuple[int, int],
    direction: tuple[int, int],
    length: int,
    style: tuple[str, tuple[int, int]],
) -> None:
    """Draw a dashed line, two pixels wide, for ``length`` pixels to the right or down."""
    colour, (dash, gap) = style
    (x, y), (right, down) = start, direction
    for begin in range(0, length, dash + gap):
        end = min(length, begin + dash)
        draw.line((x + right * begin, y + down * begin, x + right * end, y + down * end), colour, 2)


def _step(max_count: int) -> int:
    """Return the distance between ticks: 1, 2 or 5 times a power of ten, with at most _MAX_TICKS ticks."""
    steps = (factor * power for power in _POWERS_OF_TEN for factor in (1, 2, 5))
    return next(step for step in steps if step * _MAX_TICKS > max_count)


def _x(score: float) -> int:
    return round(_LEFT + score * (_RIGHT - _LEFT))
