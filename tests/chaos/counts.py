"""What a job came to: nothing lost, nothing twice, nothing stuck, every picture its own, everybody told."""

from __future__ import annotations

import io
from collections import defaultdict
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from tests.chaos.table import PROMISED
from text2img.demo.judge import judge
from text2img.demo.scenes import Scene

_ROUNDING = 4
"""Levels of 255: what a batch of another size may change in a pixel."""


@dataclass(frozen=True)
class Counts:
    """All but ``prompts`` must be 0, and ``again`` (pictures made once more) small."""

    prompts: int
    lost: int
    twice: int
    stuck: int
    wrong: int
    undelivered: int
    again: int

    @property
    def faults(self):
        """What is not as it must be."""
        return {name: number for name, number in asdict(self).items() if name in PROMISED and number}


def count(site, book, made, poison=frozenset()):
    """The counts of a site whose prompts are from this book, ``made`` pictures having been made there.

    What is ``poison`` is lost unless it was abandoned, and untold unless that was told.
    """
    prompts = {each["_id"]: each for each in site.documents("datasets")}
    done = {key: each for key, each in prompts.items() if each["status"] == "completed"}
    given_up = {key for key in poison if prompts[key].get("error_code") == "abandoned"}
    results = defaultdict(list)
    for result in site.documents("dataset_records"):
        results[result["dataset_id"]].append(result)
    notifications = _notices(site.listener.told)
    return Counts(
        prompts=len(prompts),
        lost=sum(not (key in done and _agree(done[key], results[key])) for key in prompts.keys() - given_up),
        twice=sum(len(each) > 1 for each in (*results.values(), *notifications.values())),
        stuck=sum(each["status"] == "processing" for each in prompts.values()),
        wrong=sum(not book.shows(each, site.image(key)) for key, each in done.items()),
        undelivered=sum(not notifications[str(key)] for key in done.keys() | given_up),
        again=made - len(done),
    )


def _agree(prompt, results):
    """Whether prompt and result are of the same claim and the same run."""
    said = [(each["claim_number"], each["run_id"], each["image_url"]) for each in results]
    return (prompt["claim_number"], prompt["run_id"], prompt["image_url"]) in said


def _notices(told):
    """By prompt the webhook ids under which the listener took it; an id has one body for ever."""
    bodies, taken = {}, defaultdict(set)
    for each in told:
        assert bodies.setdefault(each.id, each.body) == each.body
        outcomes = each.says["results"] + each.says["errors"]
        for result in outcomes if each.answered else ():
            taken[result["prompt_id"]].add(each.id)
    return taken


class Book:
    """Prompts, with the pictures of an undisturbed run."""

    def __init__(self, pages):
        self._pages = pages  # (caption, seed, pixels)

    def __len__(self):
        return len(self._pages)

    def prompts(self, ids, word=""):
        """A prompt for each id; the ``word`` asks something of the workers' engine."""
        pages = {key: self._page(key) for key in ids}
        return [
            {"_id": key, "text": f"{word} {caption}".strip(), "seed": seed}
            for key, (caption, seed, _) in pages.items()
        ]

    def shows(self, prompt, png):
        """Whether this is that prompt's picture: by its colours, and by the undisturbed run's pixels."""
        caption, _, pixels = self._page(prompt["_id"])
        seen, drawn = look(png)
        return is_right(seen, caption) and are_alike(drawn, pixels)

    def _page(self, key):
        return self._pages[key % len(self._pages)]


def are_alike(one, other):
    """Whether two pictures' pixels differ by no more than rounding."""
    return np.abs(one.astype(int) - other.astype(int)).max() <= _ROUNDING


def look(png):
    """What the judge makes out in a picture, and its pixels."""
    with Image.open(io.BytesIO(png)) as image:
        return judge(image), np.asarray(image.convert("RGB"))


def is_right(seen, caption):
    """Whether the two colours are the caption's."""
    scene = Scene.parse(caption)
    return (seen.colour, seen.background) == (scene.colour, scene.background)
