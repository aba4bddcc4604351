"""What a run has come to so far: outcomes, pace, and how busy the device was. Knows no database."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from text2img.prompts import Completed, Failed, NeedsRefinement, RetryLater

if TYPE_CHECKING:
    from collections.abc import Sequence

    from text2img.errors import ErrorCode
    from text2img.prompts import Outcome

DEVICE_STAGES: Final = ("load", "compile", "denoise", "decode", "wait")
"""What the device's thread does, one after another: ``wait`` is for a batch, or for room behind it."""
BACKGROUND_STAGES: Final = ("claim", "encode", "upload", "evaluate", "record")
"""What other threads do at the same time. Their times are added up, and may exceed the run's duration."""


class RunStats:
    """Counts outcomes as they are recorded and batches as they are made, from several threads.

    ``completed`` and ``failed`` are prompts that are final, ``failures`` the failed by their codes;
    ``postponed`` counts prompts that were put back to be tried again, once for each time, ``iterated`` those
    that go on with another iteration. ``pictures`` are those that were recorded, ``made`` those that the
    device has worked on, in so many ``batches``, ``busy`` with them for so many seconds. ``devices``: how
    many work, which are busy each for themselves.
    """

    def __init__(self) -> None:
        self.completed = 0
        self.pictures = 0
        self.failed = 0
        self.iterated = 0
        self.postponed = 0
        self.made = 0
        self._scored, self._scores = 0, 0.0
        self.devices = 1
        self.batches = 0
        self.busy = 0.0
        self.failures: Counter[ErrorCode] = Counter()
        self._lock = threading.Lock()
        self._begun = time.monotonic()
        self._first: tuple[int, float, float] | None = None  # the first batch: its size, start and end
        self._last_end = 0.0
        self._last_record = 0.0
        self._warming = 0.0  # seconds since the first batch began

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Count recorded outcomes."""
        with self._lock:
            done = [outcome for outcome in outcomes if isinstance(outcome, Completed)]
            self.completed += len(done)
            scores = [one.first.score for one in done if one.first.score is not None]
            self._scored, self._scores = self._scored + len(scores), self._scores + sum(scores)
            self.iterated += sum(isinstance(outcome, NeedsRefinement) for outcome in outcomes)
            self.pictures += sum(
                one.images_made for one in outcomes if isinstance(one, Completed | NeedsRefinement)
            )
            failed = [outcome.code for outcome in outcomes if isinstance(outcome, Failed)]
            self.failed += len(failed)
            self.failures.update(failed)
            self.postponed += sum(isinstance(outcome, RetryLater) for outcome in outcomes)
            self._last_record = time.monotonic()

    def batch(self, size: int, started: float, ended: float) -> None:
        """The device worked on so many pictures between these moments (``time.monotonic``)."""
        with self._lock:
            self.made += size
            self.batches += 1
            self._first = self._first or (size, started, ended)
            self._last_end = ended
            self.busy += ended - started

    def set_totals(self, completed: int, failed: int, pictures: int) -> None:
        """Outcomes were recorded of which nobody here was told: these are all."""
        with self._lock:
            self.completed, self.failed = completed, failed
            self.pictures = max(self.pictures, pictures)  # the database counts no tries of loops

    def add_compile_time(self, seconds: float) -> None:
        """The engine spent so long on making itself faster, for what comes after."""
        with self._lock:
            if self._first is not None:
                self._warming += seconds

    @property
    def score(self) -> float | None:
        """The mean score of the completed prompts' results; None where none has one."""
        with self._lock:
            return self._scores / self._scored if self._scored else None

    @property
    def settled(self) -> int:
        """How many outcomes were recorded, of whatever kind."""
        with self._lock:
            return self.completed + self.failed + self.postponed + self.iterated

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._begun

    @property
    def images_per_second(self) -> float:
        """Recorded pictures a second, from the first batch's start to the last record."""
        return 0.0 if self._first is None else _share(self.pictures, self._last_record - self._first[1])

    @property
    def steady_images_per_second(self) -> float:
        """Pictures a second from the first batch's end to the last one's, warming aside; 0 for one batch."""
        if self._first is None:
            return 0.0
        size, _, ended = self._first
        return _share(self.made - size, self._last_end - ended - self._warming)

    @property
    def device_busy(self) -> float:
        """The share of the time from the first batch's start to the last one's end in which the device worked
        on a batch, in [0, 1]. Time that was spent on warming does not count.
        """
        if self._first is None:
            return 0.0
        whole = self._last_end - self._first[1] - self._warming
        return min(1.0, _share(self.busy, whole * self.devices))

    @property
    def device_busy_of_run(self) -> float:
        """The share of the whole run, loading and all, in which the device worked on a batch, in [0, 1]."""
        return min(1.0, _share(self.busy, self.seconds * self.devices))


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
