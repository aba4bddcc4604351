"""Two runs over the same prompts, side by side: which pictures belong together, what the runs did
differently, how fast they were, how their pictures scored and how alike they are.

Knows recorded prompts and runs, and no database; pictures are bytes that somebody else reads.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from text2img.databases import Run
    from text2img.prompts import PromptId


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One of a prompt's pictures, the ``number``-th from 0, as its run recorded it.

    ``score`` in [0, 1], None where it has none; ``used`` are its parameters.
    """

    prompt: PromptId
    number: int
    text: str
    seed: int | None
    url: str
    score: float | None
    used: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two. ``name`` is what its owner calls it, ``runs`` are those that made its pictures."""

    name: str
    runs: tuple[Run, ...]
    pictures: tuple[Picture, ...]

    @property
    def images_per_second(self) -> float:
        """Of all its runs together; 0 where none of them has a pace."""
        paced = [(run.images or run.completed, run.images_per_second) for run in self.runs]
        paced = [(images, pace) for images, pace in paced if images and pace > 0]
        seconds = sum(images / pace for images, pace in paced)
        return sum(images for images, _ in paced) / seconds if seconds else 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, all its runs together."""
        total: dict[str, float] = defaultdict(float)
        for run in self.runs:
            for stage, seconds in run.seconds.items():
                if isinstance(seconds, int | float):
                    total[stage] += seconds
        return dict(total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """How alike two pictures are. ``ssim`` is at most 1, which equal pictures have; ``clip`` in [-1, 1],
    where a CLIP model was asked. What could not be told is None, and ``note`` says why, or what
    was done to the pictures first.
    """

    ssim: float | None = None
    clip: float | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Pictures of the same prompt. ``by_id``: matched by their prompts' ids, else by text and seed."""

    a: Picture
    b: Picture
    by_id: bool
    likeness: Likeness = field(default_factory=Likeness)

    @property
    def gain(self) -> float | None:
        """How much better B scores than A; None unless both have a score."""
        return None if self.a.score is None or self.b.score is None else self.b.score - self.a.score


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What the sides did differently: in so many ``pairs``, by these values, each once, in order."""

    name: str
    a: tuple[object, ...]
    b: tuple[object, ...]
    pairs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two sides, the pairs of their pictures in A's order, and how many pictures have no partner."""

    a: Side
    b: Side
    pairs: tuple[Pair, ...]

    @property
    def alone(self) -> tuple[int, int]:
        """How many pictures only A has, and only B."""
        return len(self.a.pictures) - len(self.pairs), len(self.b.pictures) - len(self.pairs)
