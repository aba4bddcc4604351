"""Group claimed requests into batches for the device, find the fastest batch size, and keep to the limit.

A batch takes nearly the same time whether it is full or not, so full ones go first, and prompts that had
killed workers go last. A request that has been overtaken too often goes next, even in a smaller batch. A
run's ``--limit`` is a claim budget.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from text2img.prompts import Request


_QUEUED_BATCHES: Final = 6
"""The number of batches' worth of requests to queue. With twenty shapes at random and a batch size of ten,
batches then still have five or six requests."""


class Batcher:
    """The requests that wait for the device, in order of arrival.

    ``max_overtakes`` is the number of batches that may overtake a request that could go in a smaller batch.
    """

    def __init__(self, sizes: Sizes, max_overtakes: int = 4) -> None:
        self._sizes = sizes
        self._max_overtakes = max_overtakes
        self._waiting: list[Request] = []
        self._overtaken = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, requests: Iterable[Request]) -> None:
        """Append the requests to the queue."""
        self._waiting.extend(requests)

    def ready(self) -> bool:
        """Return True if a batch is full, enough requests wait, or one has been overtaken too often."""
        if not self._waiting:
            return False
        if self._overtaken >= self._max_overtakes:
            return True
        enough = len(self._waiting) >= _QUEUED_BATCHES * self._sizes.usual
        return enough or any(len(group) >= self._size(group) for group in self._groups())

    def take(self) -> list[Request]:
        """Remove and return the next batch, of one shape and at most of its size; empty if none waits."""
        groups = self._groups()
        if not groups:
            return []
        oldest = groups[0]
        fewest = min(_suspicion(group) for group in groups)
        next_groups = [group for group in groups if _suspicion(group) == fewest]
        chosen = next((group for group in next_groups if len(group) >= self._size(group)), next_groups[0])
        if self._overtaken >= self._max_overtakes:
            chosen = oldest
        self._overtaken = 0 if chosen is oldest else self._overtaken + 1
        batch = chosen[: self._size(chosen)]
        taken = {id(request) for request in batch}
        self._waiting = [request for request in self._waiting if id(request) not in taken]
        return batch

    def _size(self, group: list[Request]) -> int:
        return self._sizes.of(group[0])

    def _groups(self) -> list[list[Request]]:
        """Return the waiting requests by shape, in the order of each group's oldest request."""
        groups: dict[tuple[object, ...], list[Request]] = {}
        for request in self._waiting:
            groups.setdefault(request.shape, []).append(request)
        return list(groups.values())


def _suspicion(group: list[Request]) -> int:
    """Return how many deaths count against a group that has to run alone, 0 for others."""
    return group[0].prompt.deaths if group[0].alone else 0


DEFAULT_MAX_SIZE: Final = 64
"""The maximum for ``auto`` without a number."""
_MIN_GAIN: Final = 1.05  # required speed-up per image for the search to continue with larger batches
_MIN_TRIES: Final = 2  # batches of a size before it counts as no faster: the first may include one-time costs
_MAX_SEARCHES: Final = 256  # kinds of requests that are remembered


@dataclass(frozen=True, slots=True)
class BatchSize:
    """The configured batch size: at most ``max_size`` requests; with ``auto``, the fastest up to that."""

    max_size: int
    auto: bool = False

    @classmethod
    def parse(cls, text: str) -> BatchSize:
        """Parse ``N``, ``auto`` or ``auto:N`` with N ≥ 1; raise ValueError for anything else."""
        word, colon, number = text.strip().partition(":")
        auto = word.lower() == "auto"
        if auto and not colon:
            return cls(DEFAULT_MAX_SIZE, auto=True)
        digits = number if auto else text.strip()
        if not (digits.isascii() and digits.isdigit()) or int(digits) < 1:
            raise ValueError(f"{text!r} is not a batch size")
        return cls(int(digits), auto=auto)


class Sizes(Protocol):
    """The batch sizes, queried by the thread that makes batches and updated by the one that generates."""

    @property
    def usual(self) -> int:
        """The largest batch that is worth making now."""
        ...

    def of(self, request: Request) -> int:
        """Return the maximum batch size for requests like this one, at least 1."""
        ...

    def generated(self, request: Request, size: int, seconds: float) -> None:
        """Record that a batch of ``size`` requests like this one took ``seconds``."""
        ...


class FixedSize:
    """One batch size for all requests."""

    def __init__(self, size: int) -> None:
        self.usual = size

    def of(self, request: Request) -> int:
        """Return the configured size."""
        del request
        return self.usual

    def generated(self, request: Request, size: int, seconds: float) -> None:
        """Ignore the measurement."""


class FastestSize:
    """Batch sizes found by trying 1, 2, 4 … ``max_size`` on the run's own batches.

    The size with the most images per second wins. Each kind of request (image size, steps, text windows) has
    its own search.
    """

    def __init__(self, max_size: int) -> None:
        self.usual = 1
        self._max_size = max_size
        self._searches: dict[tuple[int, ...], BatchSizeSearch] = {}
        self._lock = threading.Lock()

    def of(self, request: Request) -> int:
        """Return the size that is being tried, or that has won."""
        with self._lock:
            return self._search(request).size

    def generated(self, request: Request, size: int, seconds: float) -> None:
        """Update the search with a batch's duration."""
        with self._lock:
            self._search(request).observe(size, seconds)
            self.usual = max(search.size for search in self._searches.values())

    def _search(self, request: Request) -> BatchSizeSearch:
        parameters = request.parameters
        kind = (parameters.width, parameters.height, parameters.num_inference_steps, request.chunks)
        if kind not in self._searches and len(self._searches) >= _MAX_SEARCHES:
            self._searches.pop(next(iter(self._searches)))
        return self._searches.setdefault(kind, BatchSizeSearch(self._max_size))


@dataclass(slots=True)
class BatchSizeSearch:
    """The search for the fastest size up to ``max_size``; ``size`` is the next one to try, then the winner.

    A size that does not fit into the device's memory appears slow, since its batch is then split.
    """

    max_size: int
    size: int = 1
    _rates: dict[int, float] = field(default_factory=dict)  # the best images per second of each size
    _tries: int = 0
    _finished: bool = False

    def observe(self, size: int, seconds: float) -> None:
        """Record a batch's duration; ignore it if ``size`` is not the size being tried."""
        if self._finished or size != self.size or seconds <= 0:
            return
        before = max((rate for tried, rate in self._rates.items() if tried != size), default=0.0)
        self._rates[size] = max(self._rates.get(size, 0.0), size / seconds)
        self._tries += 1
        gains = self._rates[size] > before * _MIN_GAIN
        if gains and size < self.max_size:
            self.size, self._tries = min(2 * size, self.max_size), 0
        elif gains or self._tries >= _MIN_TRIES:
            self.size, self._finished = max(self._rates, key=lambda tried: self._rates[tried]), True


class ClaimBudget:
    """The number of prompts that a run may still claim; safe to use from several threads.

    ``limit``: the maximum for the run (None: all). ``waiting``: how many prompts there were at its start.
    ``request_quota(wanted)``: if several workers share the limit, how many of ``wanted`` more prompts this
    one may claim. A requeued prompt keeps its place in the budget until it comes due, by ``clock``: no other
    is claimed instead.
    """

    def __init__(
        self,
        limit: int | None,
        waiting: int,
        request_quota: Callable[[int], int] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit if request_quota is None else 0
        self._request_quota = request_quota
        self._clock = clock
        self._claimed = 0
        self._waiting = waiting
        self._prepared, self._images = 0, 0
        self._due: Counter[int] = Counter()  # prompts by whole second: few seconds, however many prompts
        self._lock = threading.Lock()

    def take(self, wanted: int) -> int:
        """Return how many of the ``wanted`` prompts the run may claim."""
        with self._lock:
            room = wanted if self._limit is None else min(wanted, self._limit - self._claimed)
        if self._request_quota is None or room == wanted:
            return room
        granted = self._request_quota(wanted - room)
        with self._lock:
            self._limit = (self._limit or 0) + granted
        return room + granted

    def remaining(self) -> int:
        """Return how many prompts are left for this run, if no other worker claims any and none is added."""
        with self._lock:
            available = self._waiting if self._limit is None else min(self._waiting, self._limit)
            return max(0, available - self._claimed)

    def claimed(self, prompts: int) -> None:
        """Count claimed prompts."""
        with self._lock:
            self._claimed += prompts

    def prepared(self, prompts: int, images: int) -> None:
        """Count prepared prompts and the images that they request."""
        with self._lock:
            self._prepared += prompts
            self._images += images

    def images_per_prompt(self) -> float:
        """Return the mean number of images per prompt so far; 1 before any is known."""
        with self._lock:
            return self._images / self._prepared if self._prepared else 1.0

    def requeued(self, delays: Iterable[float]) -> None:
        """Count requeued prompts, each with the seconds until it can be claimed again."""
        now = self._clock()
        with self._lock:
            self._due.update(math.ceil(now + delay) if delay else math.floor(now) for delay in delays)

    def next_retry_at(self) -> float | None:
        """Return when the next requeued prompt can be claimed again; None if there is none.

        The prompts that come due by then no longer count as claimed, and their due times are forgotten.
        """
        with self._lock:
            if not self._due:
                return None
            due = float(min(self._due))
            latest = max(due, self._clock())
            for second in [second for second in self._due if second <= latest]:
                self._claimed -= self._due.pop(second)
        return due
