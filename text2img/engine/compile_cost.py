"""Whether compiling pays: seconds it costs against seconds it will save. No torch, no clock, no files.

Compiling takes ``cost`` seconds once and then saves ``gain`` of every picture's denoising. It pays when the
pictures that are left are worth more than it costs: left · seconds each · gain > cost.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable


@dataclass(frozen=True, slots=True)
class Estimate:
    """What compiling for one shape costs (``cost``, seconds) and brings (``gain``, a share of the time).

    ``gain`` 0.2 means that a picture then takes a fifth less; below 0 that compiling slowed it down.
    """

    gain: float
    cost: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gain) and math.isfinite(self.cost) and self.gain < 1 and self.cost >= 0):
            raise ValueError(f"no estimate: {self.gain} of the time, {self.cost} s")


CAUTIOUS = Estimate(gain=0.2, cost=120.0)
"""Where nothing was ever measured: two minutes for a fifth, so that ten minutes of work must be left."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The figures of one decision: ``prompts`` left that take ``seconds`` each, and what is expected."""

    prompts: float
    seconds: float
    estimate: Estimate

    @property
    def saved(self) -> float:
        """Seconds that compiling would save."""
        return self.prompts * self.seconds * self.estimate.gain

    @property
    def pays(self) -> bool:
        """Whether more is saved than spent."""
        return self.saved > self.estimate.cost

    def __str__(self) -> str:
        return (
            f"compiling {'pays' if self.pays else 'does not pay'}: {self.prompts:.0f} prompts of this shape"
            f" are left at {self.seconds:.2f} s each; {self.estimate.gain:.0%} of that is {self.saved:.0f} s,"
            f" and compiling takes {self.estimate.cost:.0f} s"
        )


class Pace:
    """Seconds that one step of one prompt takes. The first batch warms up and is not counted."""

    def __init__(self) -> None:
        self._batches = 0
        self._steps = 0
        self._seconds = 0.0

    def add(self, steps: int, seconds: float) -> None:
        """A batch took ``seconds`` for ``steps``: its prompts times the denoising steps of each."""
        self._batches += 1
        if self._batches > 1:
            self._steps += steps
            self._seconds += seconds

    @property
    def counted(self) -> int:
        """Batches that the pace is the mean of."""
        return max(0, self._batches - 1)

    @property
    def step(self) -> float | None:
        """Seconds a step of a prompt, the mean; None before a batch was counted."""
        return self._seconds / self._steps if self._steps else None


class Ledger:
    """What came in each shape, and what its batches took with and without compiling."""

    def __init__(self) -> None:
        self._seen: Counter[Hashable] = Counter()
        self._paces: defaultdict[tuple[Hashable, int, bool], Pace] = defaultdict(Pace)

    def came(self, shape: Hashable, prompts: int) -> None:
        """So many prompts of the shape came: of those that are left, the same share will be of it."""
        self._seen[shape] += prompts

    def ahead(self, shape: Hashable, size: int, left: int, steps: int) -> tuple[float, float] | None:
        """How many prompts of the shape are still to be made, and the seconds each takes uncompiled.

        In batches of ``size``, with ``steps`` steps each; ``left`` counts the prompts of all shapes. None
        before such a batch was counted.
        """
        step = self._paces[shape, size, False].step
        if step is None:
            return None
        return left * self._seen[shape] / max(1, self._seen.total()), step * steps

    def took(self, shape: Hashable, size: int, steps: int, seconds: float, *, compiled: bool) -> float | None:
        """A batch took so long; its gain over not compiling when this is the first batch to tell it.

        ``steps``: those of one prompt.
        """
        pace = self._paces[shape, size, compiled]
        pace.add(size * steps, seconds)
        before = self._paces[shape, size, False].step
        return 1 - pace.step / before if compiled and pace.counted == 1 and pace.step and before else None
