"""What a server does when nothing is left to do: it waits, until there is more or it has waited enough.

Knows moments and events; claims nothing, and knows neither database nor broker.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from text2img.concurrency.signals import Stop


log = logging.getLogger(__name__)

_FIRST_PAUSE = 1.0  # seconds between the first looks
_GROWTH = 1.5
_GLANCE = 0.1  # seconds in which a signal is noticed


class Intake(Protocol):
    """Where prompts come from besides the database, in threads of its own."""

    def start(self) -> None:
        """Begin to take in. Raises RunFailed where that cannot be."""
        ...

    def check(self) -> None:
        """Raise what has ended the intake, if anything has."""
        ...

    def close(self) -> None:
        """Take in no more; what is half taken in comes again. A matter of seconds; may be repeated."""
        ...


class WorkSource(Protocol):
    """What decides, whenever nothing is left to claim, whether a worker goes on. The work is inside its
    ``with`` block.
    """

    @property
    def endless(self) -> bool:
        """Whether there may be prompts for ever, so that whatever pays in the long run pays."""
        ...

    def another(self, waits: Callable[[], bool], settled: int, due: float | None) -> bool:
        """Wait until there may be something to claim; False where the worker shall end.

        ``waits()`` says whether something could be claimed, ``settled`` how many outcomes there were so far,
        ``due`` when a prompt that was put back can be claimed again (``time.monotonic``), if one was.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


class PollingLoop:
    """A server's waits between its rounds; see Rounds. In the ``with`` block its intake, if any, takes in.

    ``idle_exit``: seconds after which a server with nothing to do ends; None: never. ``poll_seconds``: the
    longest time between looks for work. ``arrived``, set by whoever knows of some, ends a wait at once. The
    seconds are counted by ``clock``.
    """

    def __init__(  # noqa: PLR0913 - the clock is one of them
        self,
        stop: Stop,
        arrived: threading.Event,
        *,
        poll_seconds: float,
        idle_exit: float | None = None,
        intake: Intake | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stop, self._arrived, self._intake = stop, arrived, intake
        self._poll_seconds = poll_seconds
        self._clock = clock
        self._idle_exit = math.inf if idle_exit is None else idle_exit
        self.endless = True
        self._settled = -1
        self._idle_since = 0.0

    def __enter__(self) -> Self:
        if self._intake is not None:
            self._intake.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._intake is not None:
            self._intake.close()

    def another(self, waits: Callable[[], bool], settled: int, due: float | None) -> bool:
        """Wait until ``waits()``; False once the server has been idle for so long that it ends.

        ``settled``: outcomes so far; ``due``: when a prompt that was put back can be claimed again
        (``time.monotonic``), if one was. Raises Stopped when asked to end, and what has ended the intake.
        """
        pause = min(_FIRST_PAUSE, self._poll_seconds)
        if settled != self._settled:
            self._settled, self._idle_since = settled, self._clock()
            log.debug("idle", extra={"event": "idle"})
        else:  # what there was to claim, others were quicker to take
            self._rest(pause)
        while True:
            self._arrived.clear()
            self._look_around()
            if waits():
                return True
            now = self._clock()
            left = self._idle_since + self._idle_exit - now
            if left <= 0:
                log.info("nothing to do for %g s: ending", self._idle_exit, extra={"event": "idle_exit"})
                return False
            retry = math.inf if due is None or due <= now else due - now
            self._rest(min(pause, left, retry))
            pause = min(pause * _GROWTH, self._poll_seconds)

    def _rest(self, seconds: float) -> None:
        """Until something arrives, at most so many seconds."""
        until = self._clock() + seconds
        while (left := until - self._clock()) > 0 and not self._arrived.wait(min(left, _GLANCE)):
            self._look_around()

    def _look_around(self) -> None:
        self._stop.check()
        if self._intake is not None:
            self._intake.check()


class ClaimBudget:
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

    def take(self, wanted: int) -> int:
        """How many of the ``wanted`` prompts the run may claim."""
        with self._lock:
            room = wanted if self._limit is None else min(wanted, self._limit - self._claimed)
        if self._more is None or room == wanted:
            return room
        granted = self._more(wanted - room)
        with self._lock:
            self._limit = (self._limit or 0) + granted
        return room + granted

    def remaining(self) -> int:
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

    def requeued(self, waits: Iterable[float]) -> None:
        """Prompts were put back, to be claimed again after so many seconds each."""
        now = self._clock()
        with self._lock:
            self._due.update(math.ceil(now + wait) if wait else math.floor(now) for wait in waits)

    def next_retry_at(self) -> float | None:
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
