"""How many prompts a run may still claim, how many may be there, and when its own retries come due.

Knows numbers and moments (``time.monotonic``); claims nothing itself.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Quota:
    """Counted from several threads.

    ``limit``: prompts the run takes at the most (None: all). ``waiting``: how many there were at its start.
    ``more(wanted)``: where several workers share the limit, how many of so many this one may claim besides.
    The place of a prompt that was put back is kept for it until it comes due, by ``clock``: no other is taken
    instead.
    """

    def __init__(
        self,
        limit: int | None,
        waiting: int,
        more: Callable[[int], int] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit if more is None else 0
        self._more = more
        self._clock = clock
        self._claimed = 0
        self._waiting = waiting
        self._prepared, self._pictures = 0, 0
        self._due: Counter[int] = Counter()  # how many, by whole seconds: those are few, however many prompts
        self._lock = threading.Lock()

    def claimable(self, wanted: int) -> int:
        """How many of the ``wanted`` prompts the run may claim."""
        with self._lock:
            room = wanted if self._limit is None else min(wanted, self._limit - self._claimed)
        if self._more is None or room == wanted:
            return room
        granted = self._more(wanted - room)
        with self._lock:
            self._limit = (self._limit or 0) + granted
        return room + granted

    def unclaimed(self) -> int:
        """How many prompts are still there for this run, if nobody else takes any and none is added."""
        with self._lock:
            there = self._waiting if self._limit is None else min(self._waiting, self._limit)
            return max(0, there - self._claimed)

    def claimed(self, prompts: int) -> None:
        """So many were claimed."""
        with self._lock:
            self._claimed += prompts

    def prepared(self, prompts: int, pictures: int) -> None:
        """So many prompts turned out to ask for so many pictures."""
        with self._lock:
            self._prepared += prompts
            self._pictures += pictures

    def pictures_each(self) -> float:
        """How many pictures a prompt asks for, on average so far; 1 before any is known."""
        with self._lock:
            return self._pictures / self._prepared if self._prepared else 1.0

    def put_back(self, waits: Iterable[float]) -> None:
        """Prompts were put back, to be claimed again after so many seconds each."""
        now = self._clock()
        with self._lock:
            self._due.update(math.ceil(now + wait) if wait else math.floor(now) for wait in waits)

    def next_due(self) -> float | None:
        """When the next of them can be claimed again; None: there is none. Those that come due by then no
        longer count as claimed, and that moment is forgotten.
        """
        with self._lock:
            if not self._due:
                return None
            due = float(min(self._due))
            past = max(due, self._clock())
            for moment in [moment for moment in self._due if moment <= past]:
                self._claimed -= self._due.pop(moment)
        return due
