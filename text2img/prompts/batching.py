"""Which of the claimed requests go to the device next, together.

A batch costs nearly the same whether it is full or not, so full ones go first; a request that has been
passed over too often goes next in whatever company it has.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from text2img.prompts import Request


_AHEAD: Final = 6
"""How many batches' worth of requests may wait to find company. Twenty shapes at random then still make
batches of five or six out of ten."""


class Batcher:
    """Requests that wait for the device, in the order in which they came.

    ``patience`` is how many batches may overtake a request that could have gone with a smaller one.
    """

    def __init__(self, sizes: Sizes, patience: int = 4) -> None:
        self._sizes = sizes
        self._patience = patience
        self._waiting: list[Request] = []
        self._overtaken = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, requests: Iterable[Request]) -> None:
        """Let them wait behind those that wait already."""
        self._waiting.extend(requests)

    def ready(self) -> bool:
        """Whether to take a batch now: a full one is there, or enough wait, or somebody waits long enough."""
        if not self._waiting:
            return False
        enough = len(self._waiting) >= _AHEAD * self._sizes.usual or self._overtaken >= self._patience
        return enough or any(len(group) >= self._size(group) for group in self._groups())

    def take(self) -> list[Request]:
        """The next batch, of one shape and at most of its size; empty when nothing waits."""
        groups = self._groups()
        if not groups:
            return []
        oldest = groups[0]
        chosen = next((group for group in groups if len(group) >= self._size(group)), oldest)
        if self._overtaken >= self._patience:
            chosen = oldest
        self._overtaken = 0 if chosen is oldest else self._overtaken + 1
        batch = chosen[: self._size(chosen)]
        taken = {id(request) for request in batch}
        self._waiting = [request for request in self._waiting if id(request) not in taken]
        return batch

    def _size(self, group: list[Request]) -> int:
        return self._sizes.of(group[0])

    def _groups(self) -> list[list[Request]]:
        """Those that wait, by shape; the groups stand in the order of their oldest member."""
        groups: dict[tuple[object, ...], list[Request]] = {}
        for request in self._waiting:
            groups.setdefault(request.shape, []).append(request)
        return list(groups.values())


LARGEST: Final = 64
"""What ``auto`` stays within where nobody names a cap."""
_GAIN: Final = 1.05  # a larger batch must be so much faster an image to be worth going on
_TRIES: Final = 2  # batches of a size before it counts as no faster: the first may pay for what is made once
_KINDS: Final = 256  # so many kinds of requests are remembered


@dataclass(frozen=True, slots=True)
class BatchSize:
    """What was asked for: at most ``most`` requests a batch; ``auto``: the fastest size up to that."""

    most: int
    auto: bool = False

    @classmethod
    def parse(cls, text: str) -> BatchSize:
        """``N``, ``auto`` or ``auto:N`` with N ≥ 1; raises ValueError for anything else."""
        word, colon, number = text.strip().partition(":")
        auto = word.lower() == "auto"
        if auto and not colon:
            return cls(LARGEST, auto=True)
        digits = number if auto else text.strip()
        if not (digits.isascii() and digits.isdigit()) or int(digits) < 1:
            raise ValueError(f"{text!r} is no batch size")
        return cls(int(digits), auto=auto)


class Sizes(Protocol):
    """Asked by whoever makes batches, told by whoever generates them; from different threads."""

    @property
    def usual(self) -> int:
        """The largest batch there is reason to make at the moment."""
        ...

    def of(self, request: Request) -> int:
        """How many requests like this one may share a batch, at least 1."""
        ...

    def generated(self, request: Request, size: int, seconds: float) -> None:
        """A batch of ``size`` requests like this one took so long."""
        ...


class FixedSize:
    """The same for all."""

    def __init__(self, size: int) -> None:
        self.usual = size

    def of(self, request: Request) -> int:
        """The size that was said."""
        del request
        return self.usual

    def generated(self, request: Request, size: int, seconds: float) -> None:
        """Nothing is to be learnt."""


class FastestSize:
    """Tries 1, 2, 4 … ``most`` on the run's own batches, and stays with what made most images a second.

    Each kind of request (size, steps, windows of text) has a trial of its own.
    """

    def __init__(self, most: int) -> None:
        self.usual = 1
        self._most = most
        self._trials: dict[tuple[int, ...], BatchSizeSearch] = {}
        self._lock = threading.Lock()

    def of(self, request: Request) -> int:
        """The size that is tried at the moment, or that has won."""
        with self._lock:
            return self._trial(request).size

    def generated(self, request: Request, size: int, seconds: float) -> None:
        """Learn from a batch."""
        with self._lock:
            self._trial(request).told(size, seconds)
            self.usual = max(trial.size for trial in self._trials.values())

    def _trial(self, request: Request) -> BatchSizeSearch:
        wanted = request.parameters
        kind = (wanted.width, wanted.height, wanted.num_inference_steps, request.chunks)
        if kind not in self._trials and len(self._trials) >= _KINDS:
            self._trials.pop(next(iter(self._trials)))
        return self._trials.setdefault(kind, BatchSizeSearch(self._most))


@dataclass(slots=True)
class BatchSizeSearch:
    """The search for the fastest size up to ``most``; ``size`` is what to try next, in the end what won.

    A size that does not fit the device shows as a slow one, since it is then drawn in parts.
    """

    most: int
    size: int = 1
    _rates: dict[int, float] = field(default_factory=dict)  # the best images a second of each size
    _tries: int = 0
    _over: bool = False

    def told(self, size: int, seconds: float) -> None:
        """A batch of ``size`` took so long; one of another size than is tried at present says nothing."""
        if self._over or size != self.size or seconds <= 0:
            return
        before = max((rate for tried, rate in self._rates.items() if tried != size), default=0.0)
        self._rates[size] = max(self._rates.get(size, 0.0), size / seconds)
        self._tries += 1
        gains = self._rates[size] > before * _GAIN
        if gains and size < self.most:
            self.size, self._tries = min(2 * size, self.most), 0
        elif gains or self._tries >= _TRIES:
            self.size, self._over = max(self._rates, key=lambda tried: self._rates[tried]), True
