"""SIGTERM, SIGINT and SIGHUP: end a command at once, or ask a run to shut down gracefully."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from text2img.errors import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

_END: Final = b"\0"  # no signal has this number
_EXIT_TIMEOUT: Final = 3.0  # seconds for a command to end by itself


class Stop:
    """A request to end the run, and the signal behind it. Set and read by any thread."""

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


def _handled() -> list[signal.Signals]:
    """Return the signals that ask for an end: not SIGHUP if it was ignored at the start, as by nohup."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hangup]


def _meaning(number: int) -> int:
    """Return the signal whose status a command ends with; SIGHUP means SIGTERM."""
    return signal.SIGTERM if number == signal.SIGHUP else number


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """End the command at once on SIGTERM, SIGINT or SIGHUP: before a claim, there is nothing to release.

    A handler is needed: a container's first process ignores signals without one. Python loses an exception
    that is raised in a destructor or another callback: a second signal, or _EXIT_TIMEOUT, ends the process
    without any clean-up.

    Raises SystemExit with 128 + signal. It replaces any exception that the interrupted code raises instead,
    for example because the interruption left a library's lock in a wrong state.
    """
    received: list[int] = []
    left = threading.Event()

    def force() -> None:
        if not left.wait(_EXIT_TIMEOUT):
            os.write(2, f"text2img: stopped by signal {received[0]}\n".encode())
            os._exit(128 + received[0])

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(_meaning(number))
        if len(received) == 1:
            threading.Thread(target=force, name="exit", daemon=True).start()
        elif number != signal.SIGHUP:
            os._exit(128 + received[0])
        raise SystemExit(128 + received[0])

    with _handlers(leave):
        try:
            yield
        except Exception:
            if received:
                raise SystemExit(128 + received[0]) from None
            raise
        finally:
            left.set()


@contextmanager
def graceful_shutdown(stop: Stop) -> Iterator[None]:
    """Make SIGTERM, SIGINT and SIGHUP set ``stop`` inside this block; call it from the main thread.

    A second SIGTERM or SIGINT ends the process at once. A second SIGHUP does not: a terminal that closes may
    send two.

    Python runs a handler once the main thread's call into C returns, which a device may hold up for minutes.
    So the signals' numbers go through a pipe to a thread, which needs only the interpreter's lock.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    listener = threading.Thread(target=_listen, args=(reader, stop), name="signals", daemon=True)
    listener.start()

    def handle(number: int, frame: FrameType | None) -> None:
        del number, frame  # the listener has it

    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        with _handlers(handle):
            yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writer, _END)
        listener.join()
        os.close(writer)
        os.close(reader)


def _listen(reader: int, stop: Stop) -> None:
    """Set ``stop`` for the first signal that arrives through the pipe, until ``_END`` arrives."""
    while (byte := os.read(reader, 1)) != _END:
        number = byte[0]
        if not stop.event.is_set():
            stop.set(_meaning(number))
        elif number in {signal.SIGTERM, signal.SIGINT}:
            os._exit(128 + number)


@contextmanager
def _handlers(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handle) for number in _handled()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
