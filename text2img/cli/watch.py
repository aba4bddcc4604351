"""``status --watch``: how prompts and workers stand, again and again, until somebody has seen enough.

The pace is what the database's counts say between two looks, whoever made the pictures.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Final

from text2img.cli import status_lines
from text2img.concurrency.timeouts import within
from text2img.errors import DatabaseFailed
from text2img.worker import build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from text2img.databases import Counts, Database, Holding, Run, Selection
    from text2img.settings import Settings

_RUNS_KNOWN: Final = 50  # the latest; one that began before them is known by what it holds
_SHOWN: Final = 20  # workers
_WINDOW: Final = 60.0  # seconds over which the pace is taken
_PATIENCE: Final = 15.0  # seconds that a look may take
_SHARE: Final = 9  # pauses are at least so many times as long as the look: to count is work for a database


@dataclass(frozen=True, slots=True)
class _Look:
    """What the database said at one moment (``time.monotonic``)."""

    at: float
    counts: Counts
    notices: tuple[status_lines.Notices, status_lines.Notices]
    holdings: Sequence[Holding]
    running: Sequence[Run]


class Pace:
    """Images and prompts a second, from the counts at several moments."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, Counts]] = deque()

    def add(self, at: float, counts: Counts) -> None:
        """These are the counts at that moment, in seconds; what is older than the window is forgotten."""
        self._seen.append((at, counts))
        while len(self._seen) > 2 and at - self._seen[1][0] >= _WINDOW:
            self._seen.popleft()

    def __str__(self) -> str:
        (before, old), (now, new) = self._seen[0], self._seen[-1]
        seconds = now - before
        if not seconds:
            return "not known before the next look"
        images, settled = new.images - old.images, _settled(new) - _settled(old)
        pace = f"{max(0, images) / seconds:.2f} images/s over the last {status_lines.length(seconds)}"
        left = new.pending + new.processing
        if settled <= 0 or not left:
            return pace
        return f"{pace}; about {status_lines.length(left * seconds / settled)} left"


def watch(settings: Settings, pause: float) -> int:
    """Show it every ``pause`` seconds, or less often where a look takes long; never ends by itself.

    A database that goes away later is asked again for as long as it takes.
    """
    selection, pace = build.selection(settings), Pace()
    lines: list[str] = []
    with closing(build.database(settings, create=False)) as database, _screen() as show:
        while True:
            begun = time.monotonic()
            try:
                look = within(_PATIENCE, partial(_look, database, selection))
                pace.add(look.at, look.counts)
                lines = _lines(look, pace)
                show([_headline(), *lines])
                rest = max(pause, _SHARE * (look.at - begun))
            except (DatabaseFailed, TimeoutError) as exc:
                show([f"{_headline()}: the database is away and will be asked again: {exc}", *lines])
                rest = pause
            time.sleep(rest)


def _look(database: Database, selection: Selection) -> _Look:
    return _Look(
        counts=database.counts(selection),
        notices=(database.notices(), database.notices(webhooks=True)),
        holdings=database.holdings(selection),
        running=[run for run in database.last_runs(_RUNS_KNOWN) if run.status == "running"],
        at=time.monotonic(),
    )


def _lines(look: _Look, pace: Pace) -> list[str]:
    workers = _workers(look.holdings, look.running)
    more = [f"  … and {len(workers) - _SHOWN} more"] if len(workers) > _SHOWN else []
    return [
        *status_lines.prompts(look.counts),
        *status_lines.told(look.counts, *look.notices),
        f"pace        {pace}",
        *(["workers:", *workers[:_SHOWN], *more] if workers else ["no workers"]),
    ]


def _workers(holdings: Sequence[Holding], running: Sequence[Run]) -> list[str]:
    """Whoever holds prompts, or has a run that is not over: how many, and their last sign of life."""
    held, runs = {each.worker: each for each in holdings}, {run.worker or run.id: run for run in running}
    names = sorted({*held, *runs})
    width = max(map(len, names), default=0)
    return [f"  {name:<{width}}  {_worker(held.get(name), runs.get(name))}" for name in names]


def _worker(holding: Holding | None, run: Run | None) -> str:
    prompts, expired = (holding.prompts, holding.expired) if holding else (0, 0)
    late = f", {expired:,} of their leases expired" if expired else ""
    of = f", run {run.id}" if run else ""
    return f"{_life(holding, run)}; {prompts:,} prompts in hand{late}{of}"


def _life(holding: Holding | None, run: Run | None) -> str:
    """A run's document tells when it last said that it lives; a lease only when it ends."""
    if run is not None and run.seen_at is not None and run.alive_until is not None:
        gone = " (gone)" if run.alive_until < datetime.now(UTC) else ""
        return f"last sign of life {status_lines.age(run.seen_at)} ago{gone}"
    until = holding.lease_until if holding else None
    if until is None:
        return "no lease"
    left = (until - datetime.now(UTC)).total_seconds()
    return (
        f"lease ends in {status_lines.length(left)}"
        if left > 0
        else f"lease ended {status_lines.age(until)} ago"
    )


def _headline() -> str:
    return f"{datetime.now(UTC).astimezone():%Y-%m-%d %H:%M:%S}"


@contextmanager
def _screen() -> Iterator[Callable[[list[str]], None]]:
    """Shows lines: on a terminal in their own place, elsewhere below one another, an empty line between."""
    if not sys.stdout.isatty():
        yield lambda lines: print(*lines, "", sep="\n", flush=True)
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), auto_refresh=False) as live:
        yield lambda lines: live.update(Text("\n".join(lines)), refresh=True)


def _settled(counts: Counts) -> int:
    return counts.completed + counts.error
