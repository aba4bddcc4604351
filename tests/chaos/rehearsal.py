"""The prompts of all sites, each with the picture that an undisturbed run makes of it."""

from __future__ import annotations

from random import Random

import numpy as np

from tests.chaos.counts import Book
from text2img.demo.scenes import all_scenes, draw

_PAGES = 20


def rehearse():
    """A book of prompts; no two of their pictures look alike.

    The workers' engine paints, so the pictures are known without a run: ``test_rehearsal`` shows that an
    undisturbed one makes the same.
    """
    scenes = [each for each in all_scenes() if each.size == "large"]
    Random(3).shuffle(scenes)
    pages = enumerate(scenes[:_PAGES])
    return Book([(each.caption, n, np.asarray(draw(each, Random(n)))) for n, each in pages])
