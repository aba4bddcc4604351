"""How scores are spread, drawn as bars. Knows numbers, and nothing of what was scored or who did it."""

from __future__ import annotations

import io
import math
from array import array
from statistics import fmean, median
from typing import TYPE_CHECKING, Final

from PIL import Image, ImageDraw

from text2img.images.text_layout import Lettering

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

BINS: Final = 20
_WIDTH, _HEIGHT = 900, 560
_LEFT, _TOP, _RIGHT, _BOTTOM = 80, 110, 870, 490  # the axes, in pixels of the picture
_TICKS: Final = 6  # at the most, beside the bars
_PAPER, _INK, _FAINT, _GRID, _BAR = "#ffffff", "#1a202c", "#5a6577", "#e2e8f0", "#7fa6cc"
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
    Lettering(18).draw(page, (_LEFT, 18), title, _INK)
    if unscored:
        Lettering(12).draw(page, (_LEFT, 46), f"{unscored:,} without a score", _FAINT)


def _bars(page: Image.Image, heights: Sequence[int]) -> None:
    """Bars and axes."""
    draw, letters = ImageDraw.Draw(page), Lettering(12)
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
    draw, letters, left = ImageDraw.Draw(page), Lettering(12), _LEFT
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
