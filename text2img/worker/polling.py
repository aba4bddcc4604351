"""What a server does when nothing is left to do: it waits, until there is more or it has waited enough.

Knows moments and events; claims nothing, and knows neither database nor broker.
"""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from text2img.concurrency.stages import Stop

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


class Rounds(Protocol):
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


class Serving:
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
