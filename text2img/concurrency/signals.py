"""SIGTERM and SIGINT: end a command at once, or ask a run to shut down in good order."""

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
    """Whether, and by which signal, the run was asked to end. Set from a signal handler, read anywhere."""

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
        """Sleep, at most ``seconds``; raises Stopped as soon as the run is asked to end."""
        self._event.wait(max(0.0, seconds))
        self.check()

    @property
    def status(self) -> int:
        """The exit status of a run that the signal ended."""
        return 128 + self._number

    @property
    def event(self) -> threading.Event:
        """Set once the run was asked to end."""
        return self._event


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """SIGTERM and SIGINT end a command at once: while nothing is claimed there is nothing to give back. As a
    container's first process it would not even hear a signal that nobody handles.

    Raises SystemExit with 128 + signal, also where the code that was interrupted stumbles over that and
    raises something else: a library's lock may not be as it left it.
    """
    heard: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        heard.append(number)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Exception:
        if heard:
            raise SystemExit(128 + heard[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def graceful_shutdown(stop: Stop) -> Iterator[None]:
    """Set ``stop`` on SIGTERM and SIGINT, inside this block; a second signal ends the process at once."""

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
