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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

T = TypeVar("T")


class StageTimer:
    """Seconds spent by stage, added up over threads.

    ``heard``, if given, is told of each time: the stage, what it was spent on (where the caller said so), its
    start and its end, by ``clock``.
    """

    def __init__(
        self,
        heard: Callable[[str, Sequence[object], float, float], None] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._heard = heard
        self._clock = clock
        self._lock = threading.Lock()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str, *of: object) -> Iterator[None]:
        """Add the time spent inside to ``stage``; it is spent on these."""
        started = self._clock()
        try:
            yield
        finally:
            ended = self._clock()
            with self._lock:
                self._seconds[stage] += ended - started
            if self._heard is not None:
                self._heard(stage, of, started, ended)

    def each(self, stage: str, items: Iterable[T]) -> Iterator[T]:
        """The items, one after another; the time that each takes to come is added to ``stage``."""
        coming = iter(items)
        while True:
            with self(stage):
                item = next(coming, None)
            if item is None:
                return
            yield item

    def seconds(self) -> Mapping[str, float]:
        """Seconds so far, by stage."""
        with self._lock:
            return dict(self._seconds)


class BatchPrefetcher(Generic[T]):
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
        self._threads = _threads(name, threads, self._work)

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


class WriteBuffer(Generic[T]):
    """``threads`` threads, each of which does ``work`` on what has gathered meanwhile, all of it at once.

    That is when ``enough`` items wait, or ``patience`` seconds after the first of them came, or when the
    block is left. Whoever puts more has to wait while ``enough`` do. The first failure of ``work`` is raised
    by the next ``put`` and, at the latest, on leaving; after it nothing more is worked on.
    """

    def __init__(
        self, work: Callable[[list[T]], None], *, threads: int, enough: Callable[[], int], patience: float
    ) -> None:
        self._work_on, self._enough, self._patience = work, enough, patience
        self._waiting: list[T] = []
        self._left = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._threads = _threads("gather", threads, self._work)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._left = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        if self._failure is not None and exc is not self._failure:
            raise self._failure

    def put(self, items: Sequence[T]) -> None:
        """Hand items over; waits while enough wait. Raises the failure of the work."""
        if not items:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._failure or len(self._waiting) < self._enough())
            if self._failure is not None:
                raise self._failure
            self._waiting.extend(items)
            self._changed.notify_all()

    def _gathered(self) -> list[T]:
        """What is to be worked on next; nothing once the block was left, or after a failure."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._waiting)
            # Another thread may take what both wait for: what comes then has a patience of its own.
            self._changed.wait_for(
                lambda: self._over or not self._waiting or len(self._waiting) >= self._enough(),
                self._patience,
            )
            items, self._waiting = self._waiting, []
            self._changed.notify_all()
        return items if self._failure is None else []

    @property
    def _over(self) -> bool:
        return self._left or self._failure is not None

    def _work(self) -> None:
        # Another thread may have taken what both waited for: then there is nothing, and still more to come.
        while (items := self._gathered()) or not self._over:
            try:
                if items:
                    self._work_on(items)
            except BaseException as exc:  # noqa: BLE001 - it is raised again where items are put
                with self._changed:
                    self._failure = self._failure or exc
                    self._changed.notify_all()


def _threads(name: str, number: int, work: Callable[[], None]) -> list[threading.Thread]:
    return [threading.Thread(target=work, name=f"{name}-{each}", daemon=True) for each in range(number)]
