"""How a run ends before its time: asked by a signal, or because the device has gone quiet.

Knows signals, threads and time; what is given up when a run does not end by itself, its owner says.
"""

from __future__ import annotations

import faulthandler
import logging
import tempfile
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from text2img.concurrency.signals import Stop

log = logging.getLogger(__name__)

GRACE = 5.0
"""Seconds from a signal to giving up, which may take two more: all told less than eight. Cloud Run grants 10
before it kills, Kubernetes 30."""
_LOOK = 0.5  # seconds between looks at the device at the most


class Watchdog:
    """A thread that calls ``give_up(status)`` when the run has to end and does not.

    That is ``grace`` seconds after ``stop`` was set (128 + signal), or when inside ``watching`` no ``pulse``
    came for ``stall_timeout`` seconds (1). Leaving the ``with`` block ends the guard. ``clock`` counts the
    seconds; ``wait(event, seconds)`` waits for an event and returns whether it is set.
    """

    def __init__(  # noqa: PLR0913 - the clock and the wait are two of them
        self,
        stop: Stop,
        stall_timeout: float,
        force_exit: Callable[[int], None],
        grace: float = GRACE,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self._stop, self._stall_timeout, self._give_up = stop, stall_timeout, force_exit
        self._grace = grace
        self._clock, self._wait = clock, wait
        self._over = threading.Event()
        self._last: float | None = None
        self._thread = threading.Thread(target=self._guard, name="guard", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """The device works inside this block, and is expected to show it."""
        self.heartbeat()
        try:
            yield
        finally:
            self._last = None

    def heartbeat(self) -> None:
        """The device has made a step."""
        self._last = self._clock()

    def _guard(self) -> None:
        while not self._wait(self._over, min(_LOOK, self._stall_timeout / 4)):
            if self._stop.event.is_set():
                if not self._wait(self._over, self._grace):
                    log.warning("what is still under way after %g s is left behind", self._grace)
                    self._give_up(self._stop.status)
                return
            last = self._last
            if last is not None and self._clock() - last > self._stall_timeout:
                log.error("no step for %g s: the device hangs; ending\n%s", self._stall_timeout, stacks())
                self._give_up(1)
                return


def stacks() -> str:
    """Where every thread of this process is at the moment."""
    with tempfile.TemporaryFile("w+") as file:  # faulthandler writes to a descriptor, not to an object
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()
