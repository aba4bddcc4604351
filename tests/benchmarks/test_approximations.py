"""The figures of the approximations: what they are made from, and that the page shows those saved."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.approximations import CONTESTANTS, benchmark
from benchmarks.results import RESULTS, read, table
from benchmarks.similarity import mean_difference, psnr, ssim

PAGE = Path(__file__).parents[2] / "docs" / "approximations.md"
CHANCE = np.random.default_rng(7)
PICTURE = CHANCE.integers(0, 256, (32, 40, 3), dtype=np.uint8)


def test_equal_pictures():
    """A picture is no distance from itself."""
    assert (mean_difference(PICTURE, PICTURE), psnr(PICTURE, PICTURE)) == (0, math.inf)
    assert ssim(PICTURE, PICTURE) == pytest.approx(1)


def test_known_distances():
    """Two grey pictures of 100 and 110 are 10 levels apart: 28.13 dB, and SSIM's light term."""
    one, other = np.full_like(PICTURE, 100), np.full_like(PICTURE, 110)
    assert mean_difference(one, other) == mean_difference(other, one) == 10
    assert psnr(one, other) == pytest.approx(20 * math.log10(25.5))
    small = 2.55**2
    assert ssim(one, other) == pytest.approx((2 * 100 * 110 + small) / (100**2 + 110**2 + small))


def test_structure_counts():
    """Of two disturbances of the same size, noise costs more similarity than a shift of all values."""
    smooth = np.repeat(np.linspace(40, 200, 40)[None, :, None], 32, axis=0).repeat(3, axis=2).astype(np.uint8)
    signs = CHANCE.choice([-8, 8], (32, 40, 1))
    noisy, lighter = (smooth + signs).astype(np.uint8), smooth + np.uint8(8)
    assert psnr(noisy, smooth) == pytest.approx(psnr(lighter, smooth))
    assert ssim(noisy, smooth) < ssim(lighter, smooth) - 0.1


@pytest.mark.slow
def test_a_rehearsal():
    """The benchmark draws by every contestant it is given and compares with the first: itself exactly."""
    contestants = [one for one in CONTESTANTS if one.name in {"plain", "feature cache 5", "tiny autoencoder"}]
    result = benchmark(contestants, 4, rehearsal=True)
    plain, cached, tiny = result.rows
    assert (plain["images/s ÷ plain"], plain["mean difference"], plain["PSNR, dB"]) == (1.0, 0.0, "∞")
    assert 0 < cached["mean difference"] < 10
    assert 0 < tiny["mean difference"] < 10
    assert all(row["all right"] == "100.0%" for row in result.rows)
    assert result.status == 0


def test_the_page_shows_what_was_saved():
    """The table in docs/approximations.md is that of the saved result, which was of enough pictures."""
    saved = read(RESULTS / "approximations.json")
    page = PAGE.read_text(encoding="utf-8")
    assert table(saved["rows"]) in page
    assert saved["date"] in page
    assert saved["settings"]["prompts"] >= 100
    assert not saved["rehearsal"]
    assert len(saved["rows"]) == len(CONTESTANTS)
    assert all(check.met for check in saved["checks"])
