"""SIGTERM and SIGINT: end a command at once, or ask a run to shut down gracefully."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from text2img.errors import Stopped

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


class Stop:
    """A request to end the run, and the signal behind it. Set by a signal handler, read by any thread."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._number = 0

    def set(self, number: int) -> None:
        """Ask the run to end on behalf of signal ``number``."""
        self._number = number
        self._event.set()

    def check(self) -> None:
        """Raise Stopped if the run was asked to end."""
        if self._event.is_set():
            raise Stopped(self._number)

    def wait(self, seconds: float) -> None:
        """Sleep for at most ``seconds``; raise Stopped as soon as the run is asked to end."""
        self._event.wait(max(0.0, seconds))
        self.check()

    @property
    def status(self) -> int:
        """The exit status of a run that the signal ended."""
        return 128 + self._number

    @property
    def event(self) -> threading.Event:
        """An event that is set once the run was asked to end."""
        return self._event


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """End the command at once on SIGTERM or SIGINT: before anything is claimed, there is nothing to release.

    A handler is needed: a container's first process ignores signals without one.

    Raises SystemExit with 128 + signal. It replaces any exception that the interrupted code raises instead,
    for example because the interruption left a library's lock in a wrong state.
    """
    received: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Exception:
        if received:
            raise SystemExit(128 + received[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def graceful_shutdown(stop: Stop) -> Iterator[None]:
    """Make SIGTERM and SIGINT set ``stop`` inside this block; a second signal ends the process at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if stop.event.is_set():
            os._exit(128 + number)
        stop.set(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
