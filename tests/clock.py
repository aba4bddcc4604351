"""Time for tests whose subject it is: it passes only where something waits, and then at once.

``Clock`` stands for ``time.monotonic``, ``Event`` for the event that the code under test waits for, ``Turns``
for the waits of a thread. A database has a clock of its own; ``elapse`` lets time pass for a SQLite file.
"""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from typing import TYPE_CHECKING

from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_MOMENTS = {
    "datasets": ("lease_expires_at", "not_before"),
    "callbacks": ("lease_expires_at", "not_before"),
    "runs": ("lease_expires_at",),
}


class Clock:
    """Seconds that pass by ``sleep`` (or ``advance``) alone; ``pauses`` are those, in their order.

    It stands for the function ``time.monotonic`` and for the module ``time``. ``passes(seconds)`` is called
    for each: it lets the same time pass somewhere else.
    """

    def __init__(self, passes: Callable[[float], object] = lambda seconds: None) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []
        self._passes = passes

    def __call__(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        self._passes(seconds)

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)


class Event(threading.Event):
    """An event that is not waited for: a wait for it advances the clock instead."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        if not self.is_set():
            self._clock.advance(timeout)
        return self.is_set()


class Turns:
    """The waits of another thread, for an event: each passes, by the clock, once the test has granted it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting, self._granted = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, event: threading.Event, seconds: float) -> bool:
        """Wait in the thread that waits."""
        self._waiting.release()
        until(lambda: event.is_set() or self._granted.acquire(blocking=False))
        if not event.is_set():
            self._clock.advance(seconds)
        return event.is_set()

    def grant(self, number: int = 1) -> None:
        """Let so many waits pass; return when the thread has done its work after the last of them."""
        for _ in range(number):
            self._waiting.acquire()
            self._granted.release()
        self._waiting.acquire()
        self._waiting.release()

    def let_go(self) -> None:
        """Let one wait pass, after which the thread may end."""
        self._granted.release()


def elapse(file: Path, seconds: float) -> None:
    """Let leases and moments to come, as a SQLite database keeps them, be so many seconds nearer."""
    nearer = f"-{seconds + 0.001:.3f} seconds"  # kept to the millisecond: none may be left
    with closing(sqlite3.connect(file, timeout=60)) as connection, connection:
        for table, columns in _MOMENTS.items():
            for column in columns:
                moment = f"strftime('%Y-%m-%dT%H:%M:%fZ', {column}, ?)"
                statement = f"UPDATE {table} SET {column} = {moment} WHERE {column} IS NOT NULL"  # noqa: S608 - ours
                connection.execute(statement, [nearer])
