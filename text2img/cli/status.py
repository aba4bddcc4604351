"""Where prompts stand and what is still to be told, in lines for people. Knows counts, and asks nobody."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Final

from text2img.concurrency.timeouts import run_with_timeout
from text2img.databases.documents import number_of, state_of
from text2img.errors import ConfigurationError, DatabaseFailed
from text2img.telemetry.stats import BACKGROUND_STAGES, DEVICE_STAGES
from text2img.worker import build
from text2img.worker.job import dollars

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from PIL.Image import Image

    from text2img.databases import Counts, Database, Run, Selection, WorkerClaims
    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress


Notices = tuple[int, int]
"""How many notices are still to be told, and how many were refused for good."""


def prompts(counts: Counts) -> list[str]:
    """A line for each status."""
    oldest = f"  (oldest {age(counts.oldest_pending)} old)" if counts.oldest_pending else ""
    live, expired = counts.live_leases, counts.expired_leases
    errors = ", ".join(f"{code} {count}" for code, count in sorted(counts.errors.items()))
    return [
        f"pending     {counts.pending:>8,}{oldest}",
        f"processing  {counts.processing:>8,}  (leases: {live:,} live, {expired:,} expired)",
        f"completed   {counts.completed:>8,}",
        f"error       {counts.error:>8,}" + (f"  ({errors})" if errors else ""),
    ]


def told(counts: Counts, receivers: Notices, own: Notices) -> list[str]:
    """What the callback's receiver is still to be told, and prompts' own webhooks, where there are any."""
    lines = [_told("untold", counts.undelivered, "callbacks", receivers)]
    if counts.pending_webhooks or any(own):
        lines.append(_told("webhooks", counts.pending_webhooks, "notices", own))
    return lines


def age(moment: datetime) -> str:
    """How long ago, in its largest unit."""
    return length((datetime.now(UTC) - moment).total_seconds())


def length(seconds: float) -> str:
    """So many seconds in their largest unit; less than none are none."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _told(what: str, outcomes: int, kind: str, notifications: Notices) -> str:
    due, refused = notifications
    return f"{what:<11} {outcomes:>8,}  ({kind}: {due:,} still to be told, {refused:,} refused for good)"


_COLUMNS: Final = 40  # characters that the longest bar takes
_EIGHTHS: Final = " ▏▎▍▌▋▊▉"
_WIDTH, _LEFT, _BAR, _ROW = 900, 150, 520, 30  # pixels
_BLUE, _GREY, _GREEN, _INK = "#2b6cb0", "#a0aec0", "#2f855a", "#1a202c"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the plot; one without a ``share`` (in [0, 1], of the longest bar) is a heading."""

    label: str
    colour: str = _INK
    share: float | None = None
    figure: str = ""


def spent(run: Run) -> dict[str, float]:
    """Seconds of each stage; what is no number counts as none."""
    return {stage: number_of(run.seconds.get(stage)) for stage in (*DEVICE_STAGES, *BACKGROUND_STAGES)}


def in_terminal(run: Run) -> str:
    """The plot as lines of text."""
    return "\n".join(
        f"{row.label}"
        if row.share is None
        else f"  {row.label:<12}{_bar(row.share):<{_COLUMNS}}  {row.figure}".rstrip()
        for row in _rows(run)
    )


def as_picture(run: Run) -> Image:
    """The plot as a picture, 900 pixels wide."""
    from PIL import Image, ImageDraw, ImageFont

    rows = list(_rows(run))
    image = Image.new("RGB", (_WIDTH, _ROW * (len(rows) + 1)), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=16)
    for place, row in enumerate(rows):
        top = _ROW * place + _ROW // 2
        if row.share is None:
            draw.text((20, top + 4), row.label, _INK, font)
            continue
        draw.text((40, top + 4), row.label, _INK, font)
        if length := round(_BAR * row.share):
            draw.rectangle((_LEFT, top + 4, _LEFT + length, top + _ROW - 6), row.colour)
        draw.text((_LEFT + _BAR + 20, top + 4), row.figure, _INK, font)
    return image


def _rows(run: Run) -> Iterator[Row]:
    seconds = spent(run)
    whole = (run.finished_at - run.started_at).total_seconds() if run.finished_at else 0.0
    whole = max(whole, sum(seconds[stage] for stage in DEVICE_STAGES))
    longest = max(whole, *seconds.values()) or 1.0
    yield Row(f"{run.id}, {run.started_at:%Y-%m-%d %H:%M}, {run.status}: {_pace(run, whole)}")
    yield Row("the device's thread")
    for stage in DEVICE_STAGES:
        yield Row(stage, _BLUE, _within(seconds[stage] / longest), _figure(seconds[stage], whole))
    rest = whole - sum(seconds[stage] for stage in DEVICE_STAGES)
    yield Row("other", _BLUE, _within(rest / longest), _figure(rest, whole))
    yield Row("beside it, all threads together")
    for stage in BACKGROUND_STAGES:
        yield Row(stage, _GREY, _within(seconds[stage] / longest), _figure(seconds[stage], whole))
    yield Row("the device had a batch")
    for label, share in (("of the run", run.device_busy_of_run), ("first–last", run.device_busy)):
        yield Row(label, _GREEN, _within(share), f"{100 * share:.1f} %")


def _pace(run: Run, whole: float) -> str:
    steady = f" ({run.steady_images_per_second:.2f} in steady state)" if run.steady_images_per_second else ""
    return f"{run.completed:,} completed in {whole:.1f} s, {run.images_per_second:.2f} images/s{steady}"


def _figure(seconds: float, whole: float) -> str:
    return f"{seconds:,.1f} s" + (f"  {100 * seconds / whole:.0f} %" if whole else "")


def _within(share: float) -> float:
    return min(1.0, max(0.0, share))


def _bar(share: float) -> str:
    eighths = round(share * _COLUMNS * 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


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
    notifications: tuple[Notices, Notices]
    claims_by_worker: Sequence[WorkerClaims]
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
        pace = f"{max(0, images) / seconds:.2f} images/s over the last {length(seconds)}"
        left = new.pending + new.processing
        if settled <= 0 or not left:
            return pace
        return f"{pace}; about {length(left * seconds / settled)} left"


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
                look = run_with_timeout(_PATIENCE, partial(_look, database, selection))
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
        notifications=(database.notifications(), database.notifications(webhooks=True)),
        claims_by_worker=database.claims_by_worker(selection),
        running=[run for run in database.last_runs(_RUNS_KNOWN) if run.status == "running"],
        at=time.monotonic(),
    )


def _lines(look: _Look, pace: Pace) -> list[str]:
    workers = _workers(look.claims_by_worker, look.running)
    more = [f"  … and {len(workers) - _SHOWN} more"] if len(workers) > _SHOWN else []
    return [
        *prompts(look.counts),
        *told(look.counts, *look.notifications),
        f"pace        {pace}",
        *(["workers:", *workers[:_SHOWN], *more] if workers else ["no workers"]),
    ]


def _workers(claims_by_worker: Sequence[WorkerClaims], running: Sequence[Run]) -> list[str]:
    """Whoever holds prompts, or has a run that is not over: how many, and their last sign of life."""
    held, runs = (
        {each.worker: each for each in claims_by_worker},
        {run.worker or run.id: run for run in running},
    )
    names = sorted({*held, *runs})
    width = max(map(len, names), default=0)
    return [f"  {name:<{width}}  {_worker(held.get(name), runs.get(name))}" for name in names]


def _worker(holding: WorkerClaims | None, run: Run | None) -> str:
    prompts, expired = (holding.prompts, holding.expired) if holding else (0, 0)
    late = f", {expired:,} of their leases expired" if expired else ""
    of = f", run {run.id}" if run else ""
    return f"{_life(holding, run)}; {prompts:,} prompts in hand{late}{of}"


def _life(holding: WorkerClaims | None, run: Run | None) -> str:
    """A run's document tells when it last said that it lives; a lease only when it ends."""
    if run is not None and run.seen_at is not None and run.alive_until is not None:
        gone = " (gone)" if run.alive_until < datetime.now(UTC) else ""
        return f"last sign of life {age(run.seen_at)} ago{gone}"
    until = holding.lease_until if holding else None
    if until is None:
        return "no lease"
    left = (until - datetime.now(UTC)).total_seconds()
    return f"lease ends in {length(left)}" if left > 0 else f"lease ended {age(until)} ago"


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


_RUNS_SHOWN = 5
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.1, 86_400.0  # seconds


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Print it; the exit status."""
    del progress
    if arguments.watch is not None:
        return _watch(settings, arguments)
    if arguments.plot or arguments.plot_file:
        return _plot(settings, arguments.plot, arguments.plot_file)
    with closing(build.database(settings, create=False)) as database:
        counts = database.counts(build.selection(settings))
        notifications = database.notifications()
        own = database.notifications(webhooks=True)
        runs = database.last_runs(_RUNS_SHOWN)
    print("\n".join([*prompts(counts), *told(counts, notifications, own), *_runs(runs)]))
    return 0


def _watch(settings: Settings, arguments: argparse.Namespace) -> int:
    """Show it until somebody stops that; raises ConfigurationError for a pause that is none."""
    if arguments.plot or arguments.plot_file:
        raise ConfigurationError("--watch shows how things stand now, --plot a run: give only one of them")
    try:
        pause = float(arguments.watch)
    except ValueError:
        pause = math.nan
    if not _SHORTEST_PAUSE <= pause <= _LONGEST_PAUSE:
        raise ConfigurationError(
            f"--watch: it should be a number of seconds from {_SHORTEST_PAUSE:g} to {_LONGEST_PAUSE:g};"
            f" it is {arguments.watch[:60]!r}"
        )
    return watch(settings, pause)


def _plot(settings: Settings, run_id: str | None, file: str | None) -> int:
    """Show where the time of one run went, in the terminal or in a file; the exit status."""
    if not run_id:
        raise ConfigurationError("--plot-file needs --plot RUN, or --plot last, beside it")
    with closing(build.database(settings, create=False)) as database:
        run = next(iter(database.last_runs(1)), None) if run_id == "last" else database.run(run_id)
    if run is None:
        raise ConfigurationError(f"there is no run {run_id!r}; status without --plot lists the last ones")
    if not file:
        print(in_terminal(run))
        return 0
    try:
        as_picture(run).save(file, "PNG")
    except OSError as exc:
        raise ConfigurationError(f"--plot-file {file} cannot be written: {exc.strerror}") from exc
    print(f"where the time of {run.id} went: {file}")
    return 0


def _runs(runs: list[Run]) -> list[str]:
    if not runs:
        return ["no runs yet"]
    width = max(len(run.id) for run in runs)
    wide = max(len(state_of(run)) for run in runs)
    return ["last runs:"] + [
        f"  {run.id:<{width}}  {run.started_at:%Y-%m-%d %H:%M}  {state_of(run):<{wide}}  "
        f"{run.completed:,} completed{_several(run)}, {run.failed:,} failed, "
        f"{run.images_per_second:.2f} images/s{_cost(run)}"
        for run in runs
    ]


def _several(run: Run) -> str:
    """How many pictures the completed prompts have, where that is another number."""
    return f" ({run.images:,} pictures)" if run.images > run.completed else ""


def _cost(run: Run) -> str:
    cost = run.dollars_per_1000_images
    return "" if cost is None else f", {dollars(cost)}"
