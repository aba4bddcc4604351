"""Comparison of two runs over the same prompts: matched images, parameters, speed, scores, similarity.

It works on recorded prompts and runs, and reads no images itself.
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
class RecordedImage:
    """One of a prompt's images, with its ``number`` from 0, as its run recorded it.

    ``score`` is in [0, 1], None without an evaluation; ``used`` are the image's parameters.
    ``moved_to`` is where its file is, if no longer at its URL.
    """

    prompt: PromptId
    number: int
    text: str
    seed: int | None
    url: str
    score: float | None
    used: Mapping[str, object]
    moved_to: str | None = None

    @property
    def place(self) -> str:
        """The URL at which the image is now."""
        return self.moved_to or self.url


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of a comparison: its ``name`` as the user gave it, its images, and the runs that made them."""

    name: str
    runs: tuple[Run, ...]
    images: tuple[RecordedImage, ...]

    @property
    def images_per_second(self) -> float:
        """The speed of all its runs together; 0 if none of them has one."""
        speeds = [(run.images or run.completed, run.images_per_second) for run in self.runs]
        speeds = [(images, speed) for images, speed in speeds if images and speed > 0]
        seconds = sum(images / speed for images, speed in speeds)
        return sum(images for images, _ in speeds) / seconds if seconds else 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of all its runs, by stage."""
        total: dict[str, float] = defaultdict(float)
        for run in self.runs:
            for stage, seconds in run.seconds.items():
                if isinstance(seconds, int | float):
                    total[stage] += seconds
        return dict(total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity:
    """The similarity of two images.

    ``ssim`` is at most 1, the value of equal images. ``clip`` is in [-1, 1], if a CLIP model was given. An
    unknown value is None; ``note`` gives the reason, or how the images were resized first.
    """

    ssim: float | None = None
    clip: float | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two images of the same prompt, matched ``by_id`` of their prompts, else by text and seed."""

    a: RecordedImage
    b: RecordedImage
    by_id: bool
    similarity: Similarity = field(default_factory=Similarity)

    @property
    def gain(self) -> float | None:
        """B's score minus A's; None unless both have a score."""
        return None if self.a.score is None or self.b.score is None else self.b.score - self.a.score


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A parameter that differs between the sides in ``pairs`` pairs, with its distinct values in order."""

    name: str
    a: tuple[object, ...]
    b: tuple[object, ...]
    pairs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two sides, and the pairs of their images in A's order."""

    a: Side
    b: Side
    pairs: tuple[Pair, ...]

    @property
    def alone(self) -> tuple[int, int]:
        """The number of images that only A has, and of those that only B has."""
        return len(self.a.images) - len(self.pairs), len(self.b.images) - len(self.pairs)


MAX_VALUES: Final = 20
"""Values that are listed of a parameter that differs from prompt to prompt."""


def images_of(prompt: CompletedPrompt) -> Iterator[RecordedImage]:
    """Yield the images of a completed prompt; image n has the first seed plus n, as in generation."""
    seed = prompt.used.get("seed")
    used = prompt.used if prompt.iterations is None else {**prompt.used, "iterations": prompt.iterations}
    first_seed = seed if isinstance(seed, int) and not isinstance(seed, bool) else None
    for number, url in enumerate(prompt.image_urls):
        yield RecordedImage(
            prompt=prompt.id,
            number=number,
            text=prompt.text,
            seed=None if first_seed is None else first_seed + number,
            url=url,
            score=prompt.scores[number] if number < len(prompt.scores) else None,
            used=used,
        )


def match_images(a: Iterable[RecordedImage], b: Iterable[RecordedImage]) -> tuple[Pair, ...]:
    """Match images by the prompt's id, and the remaining ones by text and seed; return pairs in A's order.

    Each image is in at most one pair.
    """
    pairs: dict[int, Pair] = {}
    unmatched_a: dict[int, RecordedImage] = {}
    unmatched_b = {(image.prompt, image.number): image for image in b}
    for index, image in enumerate(a):
        if partner := unmatched_b.pop((image.prompt, image.number), None):
            pairs[index] = Pair(a=image, b=partner, by_id=True)
        else:
            unmatched_a[index] = image
    by_text = defaultdict(list)
    for image in reversed(unmatched_b.values()):
        by_text[image.text, image.seed].append(image)
    for index, image in unmatched_a.items():
        if partners := by_text.get((image.text, image.seed)):
            pairs[index] = Pair(a=image, b=partners.pop(), by_id=False)
    return tuple(pairs[index] for index in sorted(pairs))


def differences(a: Side, b: Side, pairs: Sequence[Pair]) -> list[Difference]:
    """Return what differs: texts, seeds and parameters of pairs, then hosts and versions of the runs."""
    recorded = [(_recorded_fields(pair.a), _recorded_fields(pair.b)) for pair in pairs]
    names = dict.fromkeys(name for pair in recorded for fields in pair for name in fields)
    found = [_difference(name, recorded) for name in names]
    environment_a, environment_b = _environment(a.runs), _environment(b.runs)
    for name in dict.fromkeys((*environment_a, *environment_b)):
        values_a, values_b = environment_a.get(name, ()), environment_b.get(name, ())
        if values_a != values_b:
            found.append(Difference(name=name, a=values_a, b=values_b, pairs=0))
    return [difference for difference in found if difference.a != difference.b or difference.pairs]


def _recorded_fields(image: RecordedImage) -> Mapping[str, object]:
    parameters = {
        name: value for name, value in image.used.items() if name not in (*PROVIDER_METADATA_FIELDS, "seed")
    }
    return {"text": image.text, **parameters, "seed": image.seed}


def _difference(
    name: str, recorded: Sequence[tuple[Mapping[str, object], Mapping[str, object]]]
) -> Difference:
    differing = [(a.get(name), b.get(name)) for a, b in recorded if a.get(name) != b.get(name)]
    values_a, values_b = (
        (_distinct(values) for values in zip(*differing, strict=True)) if differing else ((), ())
    )
    return Difference(name=name, a=values_a, b=values_b, pairs=len(differing))


def _environment(runs: Sequence[Run]) -> dict[str, tuple[object, ...]]:
    """Return the hosts of the runs, and the versions of the libraries that they used."""
    fields = [
        {"host": run.host, **{f"{name} version": version for name, version in run.versions.items()}}
        for run in runs
    ]
    names = dict.fromkeys(name for of_run in fields for name in of_run)
    return {name: _distinct(of_run[name] for of_run in fields if name in of_run) for name in names}


def _distinct(values: Iterable[object]) -> tuple[object, ...]:
    """Return the first MAX_VALUES distinct values; lists and objects are compared as JSON."""
    seen: dict[str, object] = {}
    for value in values:
        if len(seen) == MAX_VALUES:
            break
        seen.setdefault(json.dumps(value, sort_keys=True, default=str), value)
    return tuple(seen.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Count, mean, median and minimum of a sample."""

    count: int
    mean: float
    median: float
    least: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Return the spread of the values; None if there are none."""
        if not values:
            return None
        return cls(count=len(values), mean=fmean(values), median=median(values), least=min(values))

    def __str__(self) -> str:
        return f"mean {self.mean:.3f}, median {self.median:.3f}, least {self.least:.3f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonStats:
    """Statistics of all pairs.

    ``score_a`` and ``score_b`` cover the pairs in which both images have a score. Of these, ``better`` counts
    the pairs in which B's score is higher, ``worse`` those in which it is lower. ``not_compared`` counts the
    pairs without an SSIM.
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
    """Return the statistics of a comparison."""
    pairs = comparison.pairs
    scores = [(pair.a.score, pair.b.score) for pair in pairs]
    both = [(a, b) for a, b in scores if a is not None and b is not None]
    ssims = [pair.similarity.ssim for pair in pairs if pair.similarity.ssim is not None]
    by_id = sum(pair.by_id for pair in pairs)
    return ComparisonStats(
        by_id=by_id,
        by_text=len(pairs) - by_id,
        score_a=Spread.of([a for a, _ in both]),
        score_b=Spread.of([b for _, b in both]),
        better=sum(b > a for a, b in both),
        worse=sum(b < a for a, b in both),
        ssim=Spread.of(ssims),
        clip=Spread.of([pair.similarity.clip for pair in pairs if pair.similarity.clip is not None]),
        not_compared=len(pairs) - len(ssims),
    )
