"""What a run has come to so far: outcomes, pace, and where the time went. Knows no database."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from text2img.prompts import Completed, Failed, Postponed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from text2img.prompts import Outcome


class Tally:
    """Counts outcomes as they are recorded, from several threads.

    ``completed`` and ``failed`` are final; ``postponed`` counts prompts that were put back to be tried
    again, once for each time.
    """

    def __init__(self) -> None:
        self.completed = 0
        self.failed = 0
        self.postponed = 0
        self._lock = threading.Lock()
        self._first_batch: float | None = None
        self._last_record = 0.0
        self._busy = 0.0

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Count recorded outcomes."""
        with self._lock:
            self.completed += sum(isinstance(outcome, Completed) for outcome in outcomes)
            self.failed += sum(isinstance(outcome, Failed) for outcome in outcomes)
            self.postponed += sum(isinstance(outcome, Postponed) for outcome in outcomes)
            self._last_record = time.monotonic()

    def batch(self, started: float, ended: float) -> None:
        """The device worked on a batch between these moments (``time.monotonic``)."""
        with self._lock:
            if self._first_batch is None:
                self._first_batch = started
            self._busy += ended - started

    @property
    def images_per_second(self) -> float:
        """Completed pictures a second, from the first batch's start to the last record."""
        return self.completed / self._span if self._span > 0 else 0.0

    @property
    def device_busy(self) -> float:
        """The share of that time in which a batch was on the device, in [0, 1]."""
        return min(1.0, self._busy / self._span) if self._span > 0 else 0.0

    @property
    def _span(self) -> float:
        return 0.0 if self._first_batch is None else self._last_record - self._first_batch
