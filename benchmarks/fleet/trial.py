"""One trial: so many workers on one database, begun at the same moment, and what came of it."""

from __future__ import annotations

from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.fleet.crew import Done, Shift, carry
from benchmarks.fleet.watch import Log, real_mongodb, together
from benchmarks.job import at_once
from benchmarks.places import add_prompts, places
from text2img.databases import Collections, Selection, open_database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_TOGETHER = 16
"""Workers that one process carries: so few that they hardly wait for one another's interpreter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What ``workers`` did with a database. ``server_cpu``: seconds of a server of our own; None: of no such.

    ``recorded`` is how many prompts were completed.
    """

    database: str
    workers: int
    shift: Shift
    done: Sequence[Done]
    server_cpu: float | None
    recorded: int

    @property
    def log(self) -> Log:
        """What all of them saw."""
        return together([each.log for each in self.done])

    @property
    def seconds(self) -> float:
        """From the first look at the database to the last record."""
        return max(each.ended for each in self.done) - min(each.begun for each in self.done)

    @property
    def drawn(self) -> int:
        """How many pictures the devices made."""
        return sum(each.pictures for each in self.done)

    @property
    def twice(self) -> int:
        """Claims of the same number that were given twice, and pictures that were drawn without a claim."""
        claimed = self.log.claimed
        return len(claimed) - len(set(claimed)) + max(0, self.drawn - len(claimed))

    @property
    def again(self) -> int:
        """Prompts that were rightly claimed once more: given back, or their lease was over."""
        claimed = set(self.log.claimed)
        return len(claimed) - len({name for name, _ in claimed})

    @property
    def lost(self) -> int:
        """Prompts that nobody completed, unless the trial was cut short: then the rest is a later run's."""
        return 0 if self.seconds > self.shift.limit else self.workers * self.shift.share - self.recorded

    @property
    def busy(self) -> float:
        """The devices' time ÷ all of the workers' time: 1 where no device ever waited for the database."""
        return self.drawn * self.shift.seconds / sum(each.worked for each in self.done)

    @property
    def lock_held(self) -> float:
        """Seconds that a prompt holds SQLite's lock."""
        return sum(self.log.held) / max(1, self.recorded)


def attempt(kind: str, workers: int, shift: Shift) -> Trial:
    """Add the prompts, let the workers do them in processes of their own, and look at what stands there."""
    add_prompts(shift.url, workers * shift.share)
    ours = kind == "mongodb" and real_mongodb() is None
    servers = psutil.Process().children() if ours else []
    before = _cpu(servers)
    done = _carried(shift, workers)
    spent = _cpu(servers) - before if ours else None
    with closing(open_database(shift.url, Collections())) as database:
        counts = database.runs.counts(Selection())
    return Trial(
        database=kind,
        workers=workers,
        shift=shift,
        done=done,
        server_cpu=spent,
        recorded=counts.completed,
    )


def _carried(shift: Shift, workers: int) -> list[Done]:
    firsts = range(0, workers, _TOGETHER)
    crews = [range(first, min(first + _TOGETHER, workers)) for first in firsts]
    return at_once(carry, [(shift, crew, workers) for crew in crews])


def _cpu(processes: Sequence[psutil.Process]) -> float:
    return float(sum(sum(each.cpu_times()[:2]) for each in processes))


@contextmanager
def fresh_databases(kind: str) -> Iterator[Callable[[], str]]:
    """What gives the URL of an empty database each time: of a file, the stand-in or the real server."""
    if kind == "mongodb" and (uri := real_mongodb()):
        with _real(uri) as fresh:
            yield fresh
        return
    with places(kind, "folder") as place:
        yield lambda: place().database


@contextmanager
def _real(uri: str) -> Iterator[Callable[[], str]]:
    from urllib.parse import urlsplit
    from uuid import uuid4

    from pymongo import MongoClient

    names = [f"text2img_fleet_{uuid4().hex[:8]}_{number}" for number in range(100)]
    unused = iter(names)
    try:
        yield lambda: urlsplit(uri)._replace(path=f"/{next(unused)}").geturl()
    finally:
        with MongoClient[dict[str, Any]](uri) as client:
            for name in names:
                client.drop_database(name)
