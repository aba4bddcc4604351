"""The figures of the approximations: what they are made from, and that the page shows those saved."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

import numpy as np
import pytest

from benchmarks.approximations import CONTESTANTS, Contestant, Drawn, compared, compete
from benchmarks.results import RESULTS, read, table
from benchmarks.similarity import mean_difference, psnr, ssim
from text2img.demo.scenes import draw
from training.evaluate import choose_scenes

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


def test_what_was_drawn_is_compared_with_the_first():
    """The first is no distance from itself; another's pace, difference and right pictures are those of what
    it drew; pictures of other scenes miss the target, unless they need not be right.
    """
    scenes = choose_scenes(4)
    right = [np.asarray(draw(scene, Random(1))) for scene in scenes]
    lighter = [image.clip(0, 250) + np.uint8(5) for image in right]
    contestants = [Contestant(name=name, checked=name != "few") for name in ("plain", "near", "wrong", "few")]
    drawn = [
        Drawn(8.0, right),
        Drawn(2.0, lighter),
        Drawn(8.0, right[1:] + right[:1]),
        Drawn(8.0, right[1:] + right[:1]),
    ]
    result = compared(contestants, scenes, drawn, rehearsal=False)
    plain, near, wrong, _ = result.rows
    assert (plain["images/s ÷ plain"], plain["mean difference"], plain["PSNR, dB"]) == (1.0, 0.0, "∞")
    assert (near["images/s ÷ plain"], near["all right"]) == (4.0, "100.0%")
    assert 4 < near["mean difference"] <= 5
    assert wrong["all right"] == "0.0%"
    assert [(check.figure[-15:], check.met) for check in result.checks] == [
        ("plain, 20 steps", True), (" near, 20 steps", True), ("wrong, 20 steps", False),
    ]  # fmt: skip
    assert (result.status, result.details["plain_images_per_processor_second"]) == (1, 0.5)


def test_contestants_draw_the_same_scenes_by_their_own_means():
    """Each draws every scene, after a turn that does not count: the same as another like it, and something
    else with more steps.
    """
    contestants = [Contestant(name=f"{number}", steps=steps) for number, steps in enumerate((1, 1, 2))]
    one, same, other = (np.stack(each.pictures) for each in compete(contestants, choose_scenes(2)))
    assert one.shape == (2, 128, 128, 3)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


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
