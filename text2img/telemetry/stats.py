"""Statistics of a run so far: outcomes, pace, and how busy the device was."""

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
"""Stages of the device's thread, in sequence. In ``wait`` it waits for a batch, or for the next stage."""
BACKGROUND_STAGES: Final = ("claim", "encode", "upload", "evaluate", "record")
"""Stages of background threads. Their times are summed over threads, and may exceed the run's duration."""


class RunStats:
    """Counters of recorded outcomes and generated batches; safe to use from several threads.

    ``completed`` and ``failed`` count final prompts, and ``failures`` the failed ones by error code.
    ``postponed`` counts each time that a prompt was requeued for a retry. ``iterated`` counts each time that
    a prompt went on to another iteration. ``images`` counts recorded images. ``made`` counts the images
    that the device generated in ``batches`` batches, for which it was ``busy`` seconds. ``devices`` is the
    number of devices; ``busy`` is summed over them.
    """

    def __init__(self) -> None:
        self.completed = 0
        self.images = 0
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
        self._compile_time = 0.0  # seconds since the first batch began

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Count recorded outcomes."""
        with self._lock:
            done = [outcome for outcome in outcomes if isinstance(outcome, Completed)]
            self.completed += len(done)
            scores = [outcome.first.score for outcome in done if outcome.first.score is not None]
            self._scored, self._scores = self._scored + len(scores), self._scores + sum(scores)
            self.iterated += sum(isinstance(outcome, NeedsRefinement) for outcome in outcomes)
            self.images += sum(
                outcome.images_made
                for outcome in outcomes
                if isinstance(outcome, Completed | NeedsRefinement)
            )
            failed = [outcome.code for outcome in outcomes if isinstance(outcome, Failed)]
            self.failed += len(failed)
            self.failures.update(failed)
            self.postponed += sum(isinstance(outcome, RetryLater) for outcome in outcomes)
            self._last_record = time.monotonic()

    def batch(self, size: int, started: float, ended: float) -> None:
        """Count a batch of ``size`` images, generated between these moments (``time.monotonic``)."""
        with self._lock:
            self.made += size
            self.batches += 1
            self._first = self._first or (size, started, ended)
            self._last_end = ended
            self.busy += ended - started

    def set_totals(self, completed: int, failed: int, images: int) -> None:
        """Replace the counters with the database's totals.

        Workers that died may have recorded more than they reported.
        """
        with self._lock:
            self.completed, self.failed = completed, failed
            self.images = max(self.images, images)  # the database does not count the loops' tries

    def add_compile_time(self, seconds: float) -> None:
        """Add the seconds that the engine spent on compiling, to leave them out of the steady pace."""
        with self._lock:
            if self._first is not None:
                self._compile_time += seconds

    @property
    def score(self) -> float | None:
        """The mean score of the completed prompts' results; None where none has one."""
        with self._lock:
            return self._scores / self._scored if self._scored else None

    @property
    def recorded(self) -> int:
        """The number of outcomes recorded, of every kind."""
        with self._lock:
            return self.completed + self.failed + self.postponed + self.iterated

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._begun

    @property
    def images_per_second(self) -> float:
        """Recorded images a second, from the first batch's start to the last record."""
        return 0.0 if self._first is None else _share(self.images, self._last_record - self._first[1])

    @property
    def steady_images_per_second(self) -> float:
        """Images a second between the first and the last batch's end, without compiling; 0 for one batch."""
        if self._first is None:
            return 0.0
        size, _, ended = self._first
        return _share(self.made - size, self._last_end - ended - self._compile_time)

    @property
    def device_busy(self) -> float:
        """The share of the time in which the device worked on a batch, in [0, 1].

        The time runs from the first batch's start to the last one's end, without compiling.
        """
        if self._first is None:
            return 0.0
        whole = self._last_end - self._first[1] - self._compile_time
        return min(1.0, _share(self.busy, whole * self.devices))

    @property
    def device_busy_of_run(self) -> float:
        """The share of the whole run, with loading, in which the device worked on a batch, in [0, 1]."""
        return min(1.0, _share(self.busy, self.seconds * self.devices))


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
