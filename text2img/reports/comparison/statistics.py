"""What a comparison comes to: the figures that the table, the JSON and the page all show."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from text2img.reports.comparison import Comparison


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
class Figures:
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


def figures(comparison: Comparison) -> Figures:
    """What it comes to."""
    pairs = comparison.pairs
    scored = [(pair.a.score, pair.b.score) for pair in pairs]
    both = [(a, b) for a, b in scored if a is not None and b is not None]
    alike = [pair.likeness.ssim for pair in pairs if pair.likeness.ssim is not None]
    by_id = sum(pair.by_id for pair in pairs)
    return Figures(
        by_id=by_id,
        by_text=len(pairs) - by_id,
        score_a=Spread.of([a for a, _ in both]),
        score_b=Spread.of([b for _, b in both]),
        better=sum(b > a for a, b in both),
        worse=sum(b < a for a, b in both),
        ssim=Spread.of(alike),
        clip=Spread.of([pair.likeness.clip for pair in pairs if pair.likeness.clip is not None]),
        not_compared=len(pairs) - len(alike),
    )
