"""Bounded hand-over between threads, so that one stage of the flow works while another does.

Every buffer is bounded: a stage that is ahead waits for the next one. A failure in a thread is raised where
the flow next touches the stage, as the original exception.
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
    """Seconds spent in each stage, summed over threads.

    ``on_time``, if given, is called for each measured time with the stage, what the time was spent on (as
    far as the caller named it), the start and the end, by ``clock``.
    """

    def __init__(
        self,
        on_time: Callable[[str, Sequence[object], float, float], None] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_time = on_time
        self._clock = clock
        self._lock = threading.Lock()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str, *subjects: object) -> Iterator[None]:
        """Add the time spent in the block to ``stage``; ``subjects`` are what it is spent on."""
        started = self._clock()
        try:
            yield
        finally:
            ended = self._clock()
            with self._lock:
                self._seconds[stage] += ended - started
            if self._on_time is not None:
                self._on_time(stage, subjects, started, ended)

    def iterate(self, stage: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and add the time that the iterable takes for each of them to ``stage``."""
        iterator = iter(items)
        while True:
            with self(stage):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def seconds(self) -> Mapping[str, float]:
        """Return the seconds so far, by stage."""
        with self._lock:
            return dict(self._seconds)


class BatchPrefetcher(Generic[T]):
    """An iterable that computes its items ahead, in a thread of its own.

    At most ``capacity`` items wait to be taken. Leaving the ``with`` block ends the iterable at its next item
    and joins the thread.
    """

    def __init__(self, items: Iterable[T], capacity: int) -> None:
        self._items = items
        self._free = threading.Semaphore(capacity - 1)
        self._ready: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._produce, name="prefetch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed = True
        self._free.release()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        while item := self._ready.get():
            if isinstance(item, BaseException):
                raise item
            self._free.release()
            yield item[0]

    def _produce(self) -> None:
        try:
            for item in self._items:
                self._ready.put((item,))
                self._free.acquire()
                if self._closed:
                    return
            self._ready.put(None)
        except BaseException as exc:  # noqa: BLE001 - raised again where the items are taken
            self._ready.put(exc)


class Stage(Generic[T]):
    """``threads`` threads that call ``work`` on every item put; at most ``capacity`` items wait.

    Leaving the ``with`` block waits until every item has been worked on, also when the block failed:
    finished work is worth keeping. The first failure of ``work`` is raised by the next ``put``, or at the
    latest on leaving; items after it are dropped.
    """

    def __init__(self, name: str, work: Callable[[T], None], *, threads: int, capacity: int) -> None:
        self._work_on = work
        self._waiting: queue.Queue[tuple[T] | None] = queue.Queue(capacity)
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
        """Hand an item over; blocks while the stage is full. Raises the stage's first failure."""
        if self._failure is not None:
            raise self._failure
        self._waiting.put((item,))

    def _work(self) -> None:
        while item := self._waiting.get():
            if self._failure is not None:
                continue  # drop the item, so that a blocked put can return
            try:
                self._work_on(item[0])
            except BaseException as exc:  # noqa: BLE001 - raised again in the flow's own thread
                self._failure = self._failure or exc


class WriteBuffer(Generic[T]):
    """``threads`` threads, each of which calls ``work`` on all items that wait.

    A call starts when ``batch_size()`` items wait, ``max_delay`` seconds after the first of them arrived, or
    when the block is left. ``put`` blocks while ``batch_size()`` items wait. The first failure of ``work`` is
    raised by the next ``put``, or at the latest on leaving; items after it are dropped.
    """

    def __init__(
        self,
        work: Callable[[list[T]], None],
        *,
        threads: int,
        batch_size: Callable[[], int],
        max_delay: float,
    ) -> None:
        self._work_on, self._batch_size, self._max_delay = work, batch_size, max_delay
        self._waiting: list[T] = []
        self._closed = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._threads = _threads("buffer", threads, self._work)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        if self._failure is not None and exc is not self._failure:
            raise self._failure

    def put(self, items: Sequence[T]) -> None:
        """Hand items over; blocks while the buffer is full. Raises the first failure of the work."""
        if not items:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._failure or len(self._waiting) < self._batch_size())
            if self._failure is not None:
                raise self._failure
            self._waiting.extend(items)
            self._changed.notify_all()

    def _take(self) -> list[T]:
        """Wait for the next items and take them; none once the block was left, or after a failure."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._waiting)
            # Another thread may take the items that both wait for; later items then get a full delay.
            self._changed.wait_for(
                lambda: self._over or not self._waiting or len(self._waiting) >= self._batch_size(),
                self._max_delay,
            )
            items, self._waiting = self._waiting, []
            self._changed.notify_all()
        return items if self._failure is None else []

    @property
    def _over(self) -> bool:
        return self._closed or self._failure is not None

    def _work(self) -> None:
        # No items does not mean the end: another thread may have taken the ones that both waited for.
        while (items := self._take()) or not self._over:
            try:
                if items:
                    self._work_on(items)
            except BaseException as exc:  # noqa: BLE001 - raised again where items are put
                with self._changed:
                    self._failure = self._failure or exc
                    self._changed.notify_all()


def _threads(name: str, count: int, work: Callable[[], None]) -> list[threading.Thread]:
    return [threading.Thread(target=work, name=f"{name}-{index}", daemon=True) for index in range(count)]
