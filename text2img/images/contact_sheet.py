"""A contact sheet: what became of each prompt, a row for each, its tries in the order in which they were
made.

Knows pictures as bytes that somebody hands over, and neither where they are kept nor who scored them.
"""

from __future__ import annotations

import io
import math
from array import array
from dataclasses import dataclass
from itertools import islice
from statistics import fmean, median
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError

from text2img.errors import Stopped
from text2img.images.text_layout import TextLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray


ROWS: Final = 20
"""Rows of pictures on a page; with COLUMNS the bound of what a page takes in memory, some 25 MB."""
COLUMNS: Final = 6
"""Pictures in a row; a prompt with more tries goes on in the next."""
PICTURE, TEXT, MARGIN, LETTERS, SMALL = 180, 260, 16, 14, 11  # pixels
_CAPTION: Final = 3  # lines
_PAPER, _INK, _FAINT, _FRAME, _BEST = "#ffffff", "#1a202c", "#5a6577", "#a0aec0", "#1c6b41"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A picture that was made for a prompt. ``iteration`` counts from 1; ``score`` in [0, 1], None where it
    has none; ``best``: it is the prompt's result.

    ``picture`` gives its file's bytes when the page is drawn; what it raises is said in the picture's place.
    """

    iteration: int
    seed: int
    score: float | None
    best: bool
    image: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt's text and its tries, in order."""

    text: str
    tries: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class _RowSegment:
    """As much of a row as stands side by side: its tries from the ``start``-th (from 0) on, of ``of``."""

    text: str
    tries: tuple[Candidate, ...]
    start: int
    of: int


def contact_sheets(rows: Iterable[Row], *, page: int = ROWS) -> Iterator[bytes]:
    """Pages, each as the bytes of a PNG with at most ``page`` rows of pictures; none where there are no rows.

    Reads the rows, and their pictures, as it draws: memory holds one page, however many rows come. Every text
    and every file is drawn somehow; raises nothing of its own but Stopped, where a picture's reading does.
    """
    strips = (strip for row in rows for strip in _strips(row))
    while strips_here := list(islice(strips, page)):
        yield _page(strips_here)


def _strips(row: Row) -> Iterator[_RowSegment]:
    for start in range(0, max(1, len(row.tries)), COLUMNS):
        yield _RowSegment(row.text, row.tries[start : start + COLUMNS], start, len(row.tries))


def _page(strips: Sequence[_RowSegment]) -> bytes:
    usual, small = TextLayout(LETTERS), TextLayout(SMALL)
    across = max(len(strip.tries) for strip in strips) or 1
    down = PICTURE + _CAPTION * small.height + 2 * MARGIN
    size = (TEXT + 2 * MARGIN + across * (PICTURE + MARGIN), len(strips) * down)
    page = Image.new("RGB", size, _PAPER)
    for number, strip in enumerate(strips):
        top = number * down + MARGIN
        if number:
            ImageDraw.Draw(page).line((0, top - MARGIN, page.width, top - MARGIN), _FRAME)
        _write(page, strip, top, (usual, small))
        for column, each in enumerate(strip.tries):
            _show(page, each, (TEXT + 2 * MARGIN + column * (PICTURE + MARGIN), top), small)
    file = io.BytesIO()
    page.save(file, "PNG")
    return file.getvalue()


def _write(page: Image.Image, strip: _RowSegment, top: int, letters: tuple[TextLayout, TextLayout]) -> None:
    """The prompt's text, cut where the row ends, and which of its tries these are."""
    usual, small = letters
    lines = usual.lines(strip.text, TEXT, PICTURE // usual.height) or ["(no text)"]
    for number, line in enumerate(lines):
        usual.draw(page, (MARGIN, top + number * usual.height), line, _INK)
    note = _note(strip)
    small.draw(page, (MARGIN, top + PICTURE + small.height), note, _FAINT)


def _note(strip: _RowSegment) -> str:
    if strip.of == 0:
        return "no picture"
    if strip.of <= COLUMNS:
        return ""
    return f"tries {strip.start + 1}–{strip.start + len(strip.tries)} of {strip.of:,}"


def _show(page: Image.Image, one: Candidate, at: tuple[int, int], letters: TextLayout) -> None:
    """A try: its picture in a frame, or an empty frame that says why, and what is known of it below."""
    left, top = at
    try:
        image = thumbnail(one.image(), PICTURE)
    except Stopped:
        raise
    except Exception as exc:  # noqa: BLE001 - whatever is wrong with one picture, the others are shown
        _placeholder(page, exc, at, letters)
    else:
        page.paste(image, (left + (PICTURE - image.width) // 2, top + (PICTURE - image.height) // 2))
    frame = (left - 1, top - 1, left + PICTURE, top + PICTURE)
    ImageDraw.Draw(page).rectangle(frame, outline=_FRAME)
    for number, line in enumerate(_caption(one)):
        letters.draw(page, (left, top + PICTURE + 8 + number * letters.height), line, _INK)
    if one.best:
        _mark(page, at, letters)


def _caption(one: Candidate) -> tuple[str, str, str]:
    scored = one.score is not None and math.isfinite(one.score)
    score = f"score {one.score:.3f}" if scored else "no score"
    return f"iteration {one.iteration}", f"seed {one.seed}", score


def _mark(page: Image.Image, at: tuple[int, int], letters: TextLayout) -> None:
    """The best one is told by a thick frame, and by a word with a star."""
    left, top = at
    drawing, word = ImageDraw.Draw(page), "★ best"
    drawing.rectangle((left - 5, top - 5, left + PICTURE + 4, top + PICTURE + 4), outline=_BEST, width=5)
    right, bottom = left + round(letters.width(word)) + 10, top + letters.height + 3
    drawing.rectangle((left - 5, top - 5, right, bottom), _BEST)
    letters.draw(page, (left + 2, top), word, _PAPER)


def _placeholder(page: Image.Image, exc: Exception, at: tuple[int, int], letters: TextLayout) -> None:
    lines = letters.lines(
        f"cannot be shown: {str(exc) or type(exc).__name__}", PICTURE - 12, PICTURE // letters.height - 2
    )
    for number, line in enumerate(lines, 1):
        letters.draw(page, (at[0] + 6, at[1] + 6 + number * letters.height), line, _FAINT)


LARGEST: Final = 64_000_000
"""Pixels of a picture that is still opened: a small file may claim to have more than fit in memory."""
_WHITE: Final = "#ffffff"


def thumbnail(file: bytes, longest: int) -> Image.Image:
    """The picture as RGB, its longer side ``longest`` pixels, its proportions kept; transparent is white.

    Raises OSError or ValueError for what is no picture that can be read, and for one beyond LARGEST.
    """
    with _opened(file) as image:
        image.draft("RGB", (2 * longest, 2 * longest))  # a JPEG is read at a fraction of its size
        scale = longest / max(image.size)
        size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
        small = image.convert("RGBA").resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    shown = Image.new("RGB", size, _WHITE)
    shown.paste(small, mask=small)
    return shown


def pixels(file: bytes) -> NDArray[np.uint8]:
    """The picture's pixels, uint8 (height, width, 3), RGB; raises as ``thumbnail`` does."""
    with _opened(file) as image:
        return np.asarray(image.convert("RGB"))


def _opened(file: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(file))
    except UnidentifiedImageError:
        raise ValueError("it is no picture") from None
    except Image.DecompressionBombError:
        raise ValueError("it claims more pixels than are ever opened") from None
    if image.width * image.height > LARGEST:
        raise ValueError(f"it has {image.width:,} × {image.height:,} pixels, which is too large")
    return image


BINS: Final = 20
_WIDTH, _HEIGHT = 900, 560
_LEFT, _TOP, _RIGHT, _BOTTOM = 80, 110, 870, 490  # the axes, in pixels of the picture
_TICKS: Final = 6  # at the most, beside the bars
_GRID, _BAR = "#e2e8f0", "#7fa6cc"
_TENS: Final[tuple[int, ...]] = tuple(10**power for power in range(13))
_SOLID, _DASHED, _DOTTED = (1, 0), (9, 5), (3, 4)  # pixels drawn, pixels left out


def histogram(scores: Iterable[float | None], *, min_score: float | None = None, bins: int = BINS) -> bytes:
    """A PNG, 900 × 560: ``bins`` bars of equal width over [0, 1], with mean and median, and how many have no
    score: None, or a number that cannot be one.

    A bar holds its lower edge and not its upper one; the last holds 1. ``min_score`` is marked, and how many
    reach it.
    """
    values, unscored = array("d"), 0
    for score in scores:
        if score is not None and 0 <= score <= 1:
            values.append(score)
        else:
            unscored += 1
    page = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    _head(page, values, unscored)
    _bars(page, counts(values, bins))
    _lines(page, list(_marks(values, min_score)))
    file = io.BytesIO()
    page.save(file, "PNG")
    return file.getvalue()


def counts(scores: Iterable[float], bins: int) -> list[int]:
    """How many of the scores, each in [0, 1], are in each of ``bins`` parts."""
    found = [0] * bins
    for score in scores:
        found[min(bins - 1, int(score * bins))] += 1
    return found


def _head(page: Image.Image, values: Sequence[float], unscored: int) -> None:
    title = f"Scores of {len(values):,} pictures" if values else "No picture has a score"
    TextLayout(18).draw(page, (_LEFT, 18), title, _INK)
    if unscored:
        TextLayout(12).draw(page, (_LEFT, 46), f"{unscored:,} without a score", _FAINT)


def _bars(page: Image.Image, heights: Sequence[int]) -> None:
    """Bars and axes."""
    draw, letters = ImageDraw.Draw(page), TextLayout(12)
    step = _step(max(heights))
    ceiling = max(step, math.ceil(max(heights) / step) * step)
    for count in range(0, ceiling + 1, step):
        y = round(_BOTTOM - count / ceiling * (_BOTTOM - _TOP))
        draw.line((_LEFT, y, _RIGHT, y), _GRID)
        label = f"{count:,}"
        letters.draw(page, (_LEFT - 10 - round(letters.width(label)), y - 8), label, _FAINT)
    for place, count in enumerate(heights):
        left, right = _x(place / len(heights)), _x((place + 1) / len(heights))
        if count:
            top = min(_BOTTOM - 2, round(_BOTTOM - count / ceiling * (_BOTTOM - _TOP)))
            draw.rectangle((left + 1, top, right - 1, _BOTTOM), _BAR, outline=_INK)
    for tenth in range(11):
        label, x = f"{tenth / 10:.1f}", _x(tenth / 10)
        draw.line((x, _BOTTOM, x, _BOTTOM + 5), _INK)
        letters.draw(page, (x - round(letters.width(label) / 2), _BOTTOM + 9), label, _FAINT)
    draw.line((_LEFT, _BOTTOM, _RIGHT, _BOTTOM), _INK)
    letters.draw(page, (_x(0.5) - round(letters.width("score") / 2), _BOTTOM + 34), "score", _INK)
    letters.draw(page, (10, _TOP - 26), "pictures", _INK)


def _marks(
    values: Sequence[float], min_score: float | None
) -> Iterator[tuple[float, str, str, tuple[int, int]]]:
    """Where a line stands, what it says, its colour and its dashes."""
    if values:
        yield fmean(values), f"mean {fmean(values):.3f}", _INK, _SOLID
        yield median(values), f"median {median(values):.3f}", "#6b3fa0", _DASHED
    if min_score is not None and math.isfinite(min_score):
        reached = sum(value >= min_score for value in values)
        said = f"min score {min_score:.3f}, reached by {reached:,}"
        yield min(1.0, max(0.0, min_score)), said, "#b83232", _DOTTED


def _lines(page: Image.Image, marks: Sequence[tuple[float, str, str, tuple[int, int]]]) -> None:
    """The lines, and above the bars what each of them is."""
    draw, letters, left = ImageDraw.Draw(page), TextLayout(12), _LEFT
    for place, said, colour, dashes in marks:
        _dash(draw, (_x(place), _TOP - 8), (0, 1), _BOTTOM - _TOP + 8, (colour, dashes))
        _dash(draw, (left, _TOP - 35), (1, 0), 34, (colour, dashes))
        letters.draw(page, (left + 42, _TOP - 43), said, _INK)
        left += 42 + round(letters.width(said)) + 28


def _dash(
    draw: ImageDraw.ImageDraw,
    start: tuple[int, int],
    direction: tuple[int, int],
    length: int,
    style: tuple[str, tuple[int, int]],
) -> None:
    """A line of two pixels' width, ``length`` pixels to the right or down."""
    colour, (drawn, left_out) = style
    (x, y), (right, down) = start, direction
    for begin in range(0, length, drawn + left_out):
        end = min(length, begin + drawn)
        draw.line((x + right * begin, y + down * begin, x + right * end, y + down * end), colour, 2)


def _step(most: int) -> int:
    """1, 2 or 5 times a power of ten, such that few enough of it reach ``most``."""
    return next(step for ten in _TENS for step in (ten, 2 * ten, 5 * ten) if step * _TICKS > most)


def _x(score: float) -> int:
    return round(_LEFT + score * (_RIGHT - _LEFT))
