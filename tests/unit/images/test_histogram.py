"""The histogram of scores, read back from its pixels."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from text2img.images.contact_sheet import counts, histogram

LEFT, TOP, RIGHT, BOTTOM = 80, 110, 870, 490
BAR = (0x7F, 0xA6, 0xCC)


def _heights(file, bins=20):
    """Each bar's height in pixels, looked at beside its middle, where no line of theirs stands."""
    pixels = np.asarray(Image.open(io.BytesIO(file)))
    bar = (pixels == BAR).all(axis=2)
    wide = (RIGHT - LEFT) / bins
    return [int(bar[TOP - 5 : BOTTOM, round(LEFT + (place + 0.3) * wide)].sum()) for place in range(bins)]


def _column(file, score, colour):
    """How many pixels of a colour stand at a score."""
    pixels = np.asarray(Image.open(io.BytesIO(file)))
    x = round(LEFT + score * (RIGHT - LEFT))
    return int((pixels[TOP:BOTTOM, x - 1 : x + 1] == colour).all(axis=2).any(axis=1).sum())


@pytest.mark.parametrize("bins", [10, 20])
def test_every_edge_belongs_to_the_bar_above_it(bins):
    """Scores of 0, 1/bins, 2/bins … are one in each bar, and the 1 is in the last."""
    assert counts([place / bins for place in range(bins + 1)], bins) == [1] * (bins - 1) + [2]


def test_bars_are_as_high_as_their_scores_are_many():
    """Twice as many, twice as high; where there is none, no bar."""
    heights = _heights(histogram([0.12] * 2 + [0.52] * 4 + [1.0]))
    high = {place: height for place, height in enumerate(heights) if height}
    assert list(high) == [2, 10, 19]
    assert high[10] == pytest.approx(2 * high[2], abs=3)
    assert high[2] == pytest.approx(2 * high[19], abs=3)


def test_mean_median_and_threshold_stand_at_their_scores():
    """The mean is an unbroken line, the median and the score to be reached are broken ones."""
    file = histogram([0.1, 0.4, 0.4, 0.9], min_score=0.73)
    whole = BOTTOM - TOP
    assert _column(file, 0.45, (0x1A, 0x20, 0x2C)) > 0.95 * whole
    assert 0.5 * whole < _column(file, 0.4, (0x6B, 0x3F, 0xA0)) < 0.8 * whole
    assert 0.3 * whole < _column(file, 0.73, (0xB8, 0x32, 0x32)) < 0.7 * whole
    assert not _column(histogram([0.1]), 0.73, (0xB8, 0x32, 0x32))


def test_what_has_no_score_is_counted_and_makes_no_bar():
    """None, and what can be no score, change the line that counts them and no bar."""
    plain = histogram([0.5])
    odd = histogram([0.5, None, math.nan, math.inf, -1.0, 1.5])
    assert _heights(odd) == _heights(plain)
    head = [np.asarray(Image.open(io.BytesIO(file)))[40:64] for file in (plain, odd)]
    assert (head[0] == 255).all()
    assert (head[1] < 160).any()


@pytest.mark.parametrize(
    "scores", [[], [None], [0.0] * 100_000, [1.0]], ids=["none", "no score", "many", "one"]
)
def test_any_number_of_scores_is_drawn(scores):
    """Without a score, with one, with 100,000 in one bar: a picture of the same size."""
    assert Image.open(io.BytesIO(histogram(scores, min_score=0.0))).size == (900, 560)
