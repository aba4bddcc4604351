"""Stall watchdog: forces a run to exit that hangs, or that does not shut down in time after a signal."""

from __future__ import annotations

import faulthandler
import logging
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from text2img.concurrency.signals import Stop

log = logging.getLogger(__name__)

GRACE = 5.0
"""Seconds from a signal to the forced exit, which may take two more: less than eight in total. Cloud Run
grants 10 before it kills, Kubernetes 30."""
LOCKED_MARGIN = 30.0
"""Seconds beyond the stall timeout, or the grace period, after which a process ends whose Python code cannot
run at all, because a call holds the interpreter's lock."""
_MAX_POLL_INTERVAL = 0.5  # seconds between checks of the device


class Watchdog:
    """A thread that calls ``force_exit(status)`` when the run has to end and does not.

    That is ``grace`` seconds after ``stop`` was set (128 + signal), or when no ``heartbeat`` came inside
    ``watch`` for ``stall_timeout`` seconds (1). Leaving the ``with`` block ends the watchdog. ``clock``
    counts the seconds; ``wait(event, seconds)`` waits for an event and returns whether it is set.

    While a call holds the interpreter's lock, no thread of Python runs, and neither does this one. Then a
    thread in C that it keeps postponing ends the process: with status 1 and without releasing the claims,
    whose leases expire.
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
        self._stop, self.stall_timeout, self._force_exit = stop, stall_timeout, force_exit
        self._grace = grace
        self._clock, self._wait = clock, wait
        self._closed = threading.Event()
        self._last_heartbeat: float | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        with self._lock:
            faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Expect heartbeats of the device inside this block."""
        self.heartbeat()
        self._end_if_locked(self.stall_timeout)
        try:
            yield
        finally:
            self._last_heartbeat = None
            self._end_if_locked(None)

    def heartbeat(self) -> None:
        """Note that the device has made a step."""
        self._last_heartbeat = self._clock()

    def _run(self) -> None:
        while not self._wait(self._closed, min(_MAX_POLL_INTERVAL, self.stall_timeout / 4)):
            if self._stop.event.is_set():
                self._end_if_locked(self._grace)
                if not self._wait(self._closed, self._grace):
                    log.warning("shutdown grace period (%g s) exceeded; exiting", self._grace)
                    self._force_exit(self._stop.status)
                return
            last = self._last_heartbeat
            self._end_if_locked(None if last is None else self.stall_timeout)
            if last is not None and self._clock() - last > self.stall_timeout:
                log.error(
                    "no step for %g s: the device hangs; exiting",
                    self.stall_timeout,
                    extra={"stack_trace": stacks()},
                )
                self._force_exit(1)
                return

    def _end_if_locked(self, seconds: float | None) -> None:
        """Have the process end unless this is called again within ``seconds``, and a margin."""
        with self._lock, suppress(OSError, RuntimeError, ValueError):  # no standard error: no last resort
            faulthandler.cancel_dump_traceback_later()
            if seconds is not None and not self._closed.is_set() and sys.__stderr__ is not None:
                faulthandler.dump_traceback_later(seconds + LOCKED_MARGIN, exit=True, file=sys.__stderr__)


def stacks() -> str:
    """Return the current stack of every thread of this process."""
    with tempfile.TemporaryFile("w+") as file:  # faulthandler writes to a descriptor, not to an object
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()
