"""Bounded hand-over between threads: how one part of the flow works while another does. Knows no images.

Nothing here is unbounded: whoever is ahead waits. A failure in a thread comes out where the flow touches
the stage next, as the exception that it was.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from text2img.errors import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import TracebackType

T = TypeVar("T")


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


class Stopwatch:
    """Seconds spent by stage, added up over threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to ``stage``."""
        started = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[stage] += time.monotonic() - started

    def seconds(self) -> Mapping[str, float]:
        """Seconds so far, by stage."""
        with self._lock:
            return dict(self._seconds)


class Ahead(Generic[T]):
    """An iterable that works ahead of whoever takes from it, in a thread of its own.

    At most ``room`` items wait to be taken. Leaving the ``with`` block ends the iterable at its next item
    and waits for its thread.
    """

    def __init__(self, items: Iterable[T], room: int) -> None:
        self._items = items
        self._room = threading.Semaphore(room - 1)
        self._made: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
        self._left = False
        self._thread = threading.Thread(target=self._work, name="ahead", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._left = True
        self._room.release()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        while item := self._made.get():
            if isinstance(item, BaseException):
                raise item
            self._room.release()
            yield item[0]

    def _work(self) -> None:
        try:
            for item in self._items:
                self._made.put((item,))
                self._room.acquire()
                if self._left:
                    return
            self._made.put(None)
        except BaseException as exc:  # noqa: BLE001 - it is raised again where the items are taken
            self._made.put(exc)


class Stage(Generic[T]):
    """``threads`` threads that do ``work`` on whatever is put; at most ``room`` items wait.

    Leaving the ``with`` block waits until all that was put has been worked on, also when the block failed:
    what is finished is worth keeping. The first failure of ``work`` is raised by the next ``put`` and, at
    the latest, on leaving; after it nothing more is worked on.
    """

    def __init__(self, name: str, work: Callable[[T], None], *, threads: int, room: int) -> None:
        self._work_on = work
        self._waiting: queue.Queue[tuple[T] | None] = queue.Queue(room)
        self._failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()
        if self._failure is not None and exc is not self._failure:
            raise self._failure

    def put(self, item: T) -> None:
        """Hand an item over; waits while there is no room. Raises the stage's first failure."""
        if self._failure is not None:
            raise self._failure
        self._waiting.put((item,))

    def _work(self) -> None:
        while item := self._waiting.get():
            if self._failure is not None:
                continue  # taken and dropped, so that nobody waits for room for ever
            try:
                self._work_on(item[0])
            except BaseException as exc:  # noqa: BLE001 - it is raised again in the flow's own thread
                self._failure = self._failure or exc
