"""The undisturbed run that all others are compared with."""

from __future__ import annotations

from random import Random

from tests.chaos.counts import Book, is_right, look
from tests.chaos.sites import FileSite
from tests.chaos.workers import Worker
from text2img.demo.scenes import all_scenes

_TRIED, _WANTED = 32, 20


def rehearse(folder):
    """A book of prompts whose pictures are right when nothing goes wrong; no two look alike."""
    scenes = [each for each in all_scenes() if each.size == "large"]
    Random(3).shuffle(scenes)
    captions = {n: each.caption for n, each in enumerate(scenes[:_TRIED])}
    site = FileSite(folder)
    site.add([{"_id": n, "text": caption, "seed": n} for n, caption in captions.items()])
    with Worker(site, "rehearsal") as worker:
        assert worker.wait() == 0, worker.text[-3000:]
    pages = []
    for n, caption in captions.items():
        seen, pixels = look(site.picture(n))
        if is_right(seen, caption):
            pages.append((caption, n, pixels))
    assert len(pages) >= _WANTED, f"the model draws only {len(pages)} of {_TRIED} right"
    return Book(pages[:_WANTED])
