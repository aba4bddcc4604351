"""The prompts of all sites, each with the picture that an undisturbed run makes of it."""

from __future__ import annotations

from random import Random

from tests.chaos.counts import Book
from tests.chaos.workers import STEPS
from tests.fakes.sleeping import paint
from text2img.demo.scenes import all_scenes

_PAGES = 20
_SIZE = (128, 128)  # pixels; the demo model's own


def rehearse():
    """A book of prompts; no two of their pictures look alike.

    The workers' engine paints, so the pictures are known without a run: ``test_rehearsal`` shows that an
    undisturbed one makes the same.
    """
    scenes = [each for each in all_scenes() if each.size == "large"]
    Random(3).shuffle(scenes)
    pages = enumerate(each.caption for each in scenes[:_PAGES])
    return Book([(caption, n, paint(caption, n, STEPS, _SIZE)) for n, caption in pages])
