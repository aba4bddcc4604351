"""How a server waits when nothing is left to claim: it polls until it has been idle for too long."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from text2img.concurrency.signals import Stop


log = logging.getLogger(__name__)

_INITIAL_PAUSE = 1.0  # seconds between the first polls
_PAUSE_GROWTH = 1.5
_STOP_POLL_INTERVAL = 0.1  # seconds in which a signal is noticed


class Intake(Protocol):
    """A source of prompts besides the database, such as a broker, with its own threads."""

    def start(self) -> None:
        """Start to take in prompts. Raises RunFailed if that is impossible."""
        ...

    def check(self) -> None:
        """Raise the error that ended the intake, if there was one."""
        ...

    def close(self) -> None:
        """Stop within seconds. A message that is half taken in is delivered again. May be repeated."""
        ...


class WorkSource(Protocol):
    """Decides whether a worker goes on when nothing is left to claim.

    The work is done inside its ``with`` block.
    """

    @property
    def long_running(self) -> bool:
        """True if prompts may keep coming, so that long-term optimisations pay off."""
        ...

    def wait_for_work(self, has_work: Callable[[], bool], recorded: int, next_retry_at: float | None) -> bool:
        """Wait until there may be something to claim; return False if the worker has to end.

        ``has_work()`` is True if something can be claimed; ``recorded`` is the number of outcomes so far;
        ``next_retry_at`` is when a requeued prompt can be claimed again (``time.monotonic``), if any.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


class PollingLoop:
    """A server's waits between its rounds; see WorkSource. Its intake, if any, runs in the ``with`` block.

    ``idle_exit``: seconds after which an idle server ends; None: never. ``poll_seconds``: the maximum time
    between polls. ``arrived`` is set when new work arrives, and ends a wait at once. ``clock`` counts the
    seconds.
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
        self.long_running = True
        self._recorded = -1
        self._idle_since = 0.0

    def __enter__(self) -> Self:
        if self._intake is not None:
            self._intake.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._intake is not None:
            self._intake.close()

    def wait_for_work(self, has_work: Callable[[], bool], recorded: int, next_retry_at: float | None) -> bool:
        """Wait until ``has_work()``; return False once the server has been idle for ``idle_exit``.

        See WorkSource. Raises Stopped when asked to end, and the error that ended the intake.
        """
        pause = min(_INITIAL_PAUSE, self._poll_seconds)
        if recorded != self._recorded:
            self._recorded, self._idle_since = recorded, self._clock()
            log.debug("idle", extra={"event": "idle"})
        else:  # another worker claimed it first
            self._sleep(pause)
        while True:
            self._arrived.clear()
            self._check()
            if has_work():
                return True
            now = self._clock()
            left = self._idle_since + self._idle_exit - now
            if left <= 0:
                log.info("idle for %g s; exiting", self._idle_exit, extra={"event": "idle_exit"})
                return False
            until_retry = math.inf if next_retry_at is None or next_retry_at <= now else next_retry_at - now
            self._sleep(min(pause, left, until_retry))
            pause = min(pause * _PAUSE_GROWTH, self._poll_seconds)

    def _sleep(self, seconds: float) -> None:
        """Wait until something arrives, for at most ``seconds``."""
        deadline = self._clock() + seconds
        while (left := deadline - self._clock()) > 0 and not self._arrived.wait(
            min(left, _STOP_POLL_INTERVAL)
        ):
            self._check()

    def _check(self) -> None:
        self._stop.check()
        if self._intake is not None:
            self._intake.check()
