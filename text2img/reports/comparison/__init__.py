"""Two runs over the same prompts, side by side: which pictures belong together, what the runs did
differently, how fast they were, how their pictures scored and how alike they are.

Knows recorded prompts and runs, and no database; pictures are bytes that somebody else reads.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING, Final

from text2img.prompts import PROVIDER_METADATA_FIELDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from text2img.databases import CompletedPrompt, Run
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
class Similarity:
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
    similarity: Similarity = field(default_factory=Similarity)

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


MOST_VALUES: Final = 20
"""Of a parameter that each prompt has for itself, so many values are told."""


def pictures_of(made: CompletedPrompt) -> Iterator[Picture]:
    """The pictures of a completed prompt; the n-th has the seed of the first and n, as they are made."""
    seed = made.used.get("seed")
    used = made.used if made.iterations is None else {**made.used, "iterations": made.iterations}
    first = seed if isinstance(seed, int) and not isinstance(seed, bool) else None
    for number, url in enumerate(made.image_urls):
        yield Picture(
            prompt=made.id,
            number=number,
            text=made.text,
            seed=None if first is None else first + number,
            url=url,
            score=made.scores[number] if number < len(made.scores) else None,
            used=used,
        )


def matched(a: Iterable[Picture], b: Iterable[Picture]) -> tuple[Pair, ...]:
    """The pairs in A's order: by the prompt's id, and what that leaves over by its text and the seed.

    Each picture is in one pair at the most.
    """
    pairs: dict[int, Pair] = {}
    left: dict[int, Picture] = {}
    theirs = {(one.prompt, one.number): one for one in b}
    for place, ours in enumerate(a):
        if partner := theirs.pop((ours.prompt, ours.number), None):
            pairs[place] = Pair(a=ours, b=partner, by_id=True)
        else:
            left[place] = ours
    by_text = defaultdict(list)
    for their in reversed(theirs.values()):
        by_text[their.text, their.seed].append(their)
    for place, ours in left.items():
        if partners := by_text.get((ours.text, ours.seed)):
            pairs[place] = Pair(a=ours, b=partners.pop(), by_id=False)
    return tuple(pairs[place] for place in sorted(pairs))


def differences(a: Side, b: Side, pairs: Sequence[Pair]) -> list[Difference]:
    """What differs: the texts, seeds and parameters of pairs, then where and with what the runs were made."""
    recorded = [(_recorded(pair.a), _recorded(pair.b)) for pair in pairs]
    names = dict.fromkeys(name for both in recorded for one in both for name in one)
    found = [_difference(name, recorded) for name in names]
    around = [_around(a.runs), _around(b.runs)]
    for name in dict.fromkeys((*around[0], *around[1])):
        ours, theirs = (one.get(name, ()) for one in around)
        if ours != theirs:
            found.append(Difference(name=name, a=ours, b=theirs, pairs=0))
    return [each for each in found if each.a != each.b or each.pairs]


def _recorded(image: Picture) -> Mapping[str, object]:
    parameters = {
        name: value for name, value in image.used.items() if name not in (*PROVIDER_METADATA_FIELDS, "seed")
    }
    return {"text": image.text, **parameters, "seed": image.seed}


def _difference(
    name: str, recorded: Sequence[tuple[Mapping[str, object], Mapping[str, object]]]
) -> Difference:
    differing = [(a.get(name), b.get(name)) for a, b in recorded if a.get(name) != b.get(name)]
    ours, theirs = (_distinct(values) for values in zip(*differing, strict=True)) if differing else ((), ())
    return Difference(name=name, a=ours, b=theirs, pairs=len(differing))


def _around(runs: Sequence[Run]) -> dict[str, tuple[object, ...]]:
    """What of a run is not a picture's: its host and the versions of what it used."""
    said = [{"host": run.host, **{f"{name} version": v for name, v in run.versions.items()}} for run in runs]
    names = dict.fromkeys(name for one in said for name in one)
    return {name: _distinct(one[name] for one in said if name in one) for name in names}


def _distinct(values: Iterable[object]) -> tuple[object, ...]:
    """Each value once, in order, MOST_VALUES at the most; lists and objects are no keys, their JSON is."""
    seen: dict[str, object] = {}
    for value in values:
        if len(seen) == MOST_VALUES:
            break
        seen.setdefault(json.dumps(value, sort_keys=True, default=str), value)
    return tuple(seen.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of some numbers: how many, their mean, their median, and the least of them."""

    count: int
    mean: float
    median: float
    least: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None where there are none."""
        if not values:
            return None
        return cls(count=len(values), mean=fmean(values), median=median(values), least=min(values))

    def __str__(self) -> str:
        return f"mean {self.mean:.3f}, median {self.median:.3f}, least {self.least:.3f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonStats:
    """Of all pairs. ``score_a`` and ``score_b`` are those of pairs in which both have one; of these
    ``better`` counts in how many B's is higher, ``worse`` in how many lower. ``not_compared``: pairs without
    an SSIM.
    """

    by_id: int
    by_text: int
    score_a: Spread | None
    score_b: Spread | None
    better: int
    worse: int
    ssim: Spread | None
    clip: Spread | None
    not_compared: int


def comparison_stats(comparison: Comparison) -> ComparisonStats:
    """What it comes to."""
    pairs = comparison.pairs
    scored = [(pair.a.score, pair.b.score) for pair in pairs]
    both = [(a, b) for a, b in scored if a is not None and b is not None]
    alike = [pair.similarity.ssim for pair in pairs if pair.similarity.ssim is not None]
    by_id = sum(pair.by_id for pair in pairs)
    return ComparisonStats(
        by_id=by_id,
        by_text=len(pairs) - by_id,
        score_a=Spread.of([a for a, _ in both]),
        score_b=Spread.of([b for _, b in both]),
        better=sum(b > a for a, b in both),
        worse=sum(b < a for a, b in both),
        ssim=Spread.of(alike),
        clip=Spread.of([pair.similarity.clip for pair in pairs if pair.similarity.clip is not None]),
        not_compared=len(pairs) - len(alike),
    )
