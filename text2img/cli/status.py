"""``status``: print counts of prompts and undelivered outcomes, the last runs, and a plot of a run's time.

``--watch`` repeats it, with speed and workers. ``--plot`` draws the time by stage in the terminal or a file.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from text2img.cli import timing_plot
from text2img.concurrency.timeouts import run_with_timeout
from text2img.databases.run_documents import run_fields, state_of
from text2img.errors import ConfigurationError, DatabaseFailed
from text2img.telemetry.logs import Mask
from text2img.telemetry.terminal import (
    can_redraw,
    escape,
    print_lines,
    print_result,
    prints_json,
    shorten,
)
from text2img.worker import build
from text2img.worker.job import dollars

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from text2img.databases import Counts, Database, Run, Selection, WorkerClaims
    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress


_MAX_STATES: Final = 5  # values of unknown statuses that are listed
_MAX_CODES: Final = 20  # error codes that are listed; a document may hold any text as its code

NotificationCounts = tuple[int, int]
"""The number of notifications still to be sent, and the number rejected permanently."""


def prompt_lines(counts: Counts) -> list[str]:
    """Return a line for each status of prompts."""
    oldest = f"  (oldest {age(counts.oldest_pending)} old)" if counts.oldest_pending else ""
    live, expired = counts.live_leases, counts.expired_leases
    codes = [f"{shorten(code)} {count}" for code, count in sorted(counts.errors.items())]
    more = [f"{len(codes) - _MAX_CODES} more codes"] if len(codes) > _MAX_CODES else []
    errors = ", ".join([*codes[:_MAX_CODES], *more])
    removed = [f"removed     {counts.removed:>8,}  (left their input file)"] if counts.removed else []
    return [
        f"pending     {counts.pending:>8,}{oldest}",
        f"processing  {counts.processing:>8,}  (leases: {live:,} live, {expired:,} expired)",
        f"completed   {counts.completed:>8,}",
        f"error       {counts.error:>8,}" + (f"  ({errors})" if errors else ""),
        *removed,
        *_other_line(counts.other),
    ]


def _other_line(other: Mapping[str, int]) -> list[str]:
    """Return the line of prompts whose status is not this job's, with the most frequent values."""
    if not other:
        return []
    values = [f"{shorten(value)} {count:,}" for value, count in list(other.items())[:_MAX_STATES]]
    more = [f"{len(other) - _MAX_STATES} more values"] if len(other) > _MAX_STATES else []
    return [f"other       {sum(other.values()):>8,}  (status {', '.join([*values, *more])})"]


def delivery_lines(counts: Counts, callbacks: NotificationCounts, webhooks: NotificationCounts) -> list[str]:
    """Return a line for the undelivered callbacks, and one for prompts' own webhooks if there are any."""
    lines = [_delivery_line("undelivered", counts.undelivered, "callbacks", callbacks)]
    if counts.pending_webhooks or any(webhooks):
        lines.append(_delivery_line("webhooks", counts.pending_webhooks, "notifications", webhooks))
    return lines


def status_document(
    counts: Counts, callbacks: NotificationCounts, webhooks: NotificationCounts
) -> dict[str, object]:
    """Return the counts in the form of ``--json``; ``oldest_pending`` is a time, null if nothing waits."""

    def delivery(outcomes: int, notifications: NotificationCounts) -> dict[str, int]:
        to_send, rejected = notifications
        return {"outcomes": outcomes, "to_send": to_send, "rejected": rejected}

    statuses = ("pending", "processing", "completed", "error", "removed")
    return {
        "status": 0,
        "prompts": {
            **{name: getattr(counts, name) for name in statuses},
            "other": sum(counts.other.values()),
        },
        "other_statuses": dict(counts.other),
        "images": counts.images,
        "oldest_pending": counts.oldest_pending,
        "leases": {"live": counts.live_leases, "expired": counts.expired_leases},
        "errors": dict(counts.errors),
        "undelivered": {
            "callbacks": delivery(counts.undelivered, callbacks),
            "webhooks": delivery(counts.pending_webhooks, webhooks),
        },
    }


def run_document(run: Run) -> dict[str, object]:
    """Return a run in the form of ``--json``: the fields of its document, with its state as it is now."""
    fields = run_fields(run, 0)
    seconds = fields.pop("seconds")
    return {"run_id": run.id, **fields, "status": state_of(run), "seconds_by_stage": seconds}


def age(moment: datetime) -> str:
    """Return the time since ``moment``, in its largest unit."""
    return duration((datetime.now(UTC) - moment).total_seconds())


def duration(seconds: float) -> str:
    """Return the duration in its largest unit; a negative one is 0 s."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _delivery_line(label: str, outcomes: int, kind: str, notifications: NotificationCounts) -> str:
    due, rejected = notifications
    return f"{label:<11} {outcomes:>8,}  ({kind}: {due:,} to be sent, {rejected:,} rejected)"


_MAX_RUNNING: Final = 50  # the latest runs; a worker of an older run is known by its claims
_MAX_WORKERS: Final = 20  # workers that are listed
_WINDOW: Final = 60.0  # seconds over which the speed is measured
_QUERY_TIMEOUT: Final = 15.0  # seconds
_MIN_PAUSE_FACTOR: Final = 9  # minimum pause relative to the query's duration: counting loads the database


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The state of the database at one time (``time.monotonic``)."""

    at: float
    counts: Counts
    notifications: tuple[NotificationCounts, NotificationCounts]
    claims_by_worker: Sequence[WorkerClaims]
    running: Sequence[Run]


class Pace:
    """Images and prompts a second, from the counts at several times."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, Counts]] = deque()

    def add(self, at: float, counts: Counts) -> None:
        """Add the counts at a time in seconds; drop those that are older than the window."""
        self._counts.append((at, counts))
        while len(self._counts) > 2 and at - self._counts[1][0] >= _WINDOW:
            self._counts.popleft()

    @property
    def figures(self) -> tuple[float, float, float | None] | None:
        """The seconds measured, images a second and the seconds left; None before the second count."""
        (before, old), (now, new) = self._counts[0], self._counts[-1]
        seconds = now - before
        if not seconds:
            return None
        images, done = new.images - old.images, _done(new) - _done(old)
        left = new.pending + new.processing
        return seconds, max(0, images) / seconds, left * seconds / done if done > 0 and left else None

    def __str__(self) -> str:
        if self.figures is None:
            return "not known yet"
        seconds, images_per_second, left = self.figures
        pace = f"{images_per_second:.2f} images/s over the last {duration(seconds)}"
        return pace if left is None else f"{pace}; about {duration(left)} left"


def watch(settings: Settings, pause: float) -> int:
    """Show the status every ``pause`` seconds, less often if the query is slow; never return.

    While the database is unavailable, it is queried again at every pause.
    """
    selection, pace, mask = build.selection(settings), Pace(), Mask(settings.secrets)
    lines: list[str] = []
    with closing(build.database(settings, create=False)) as database, _screen() as show:
        while True:
            started = time.monotonic()
            try:
                snapshot = run_with_timeout(_QUERY_TIMEOUT, partial(_query, database, selection))
                pace.add(snapshot.at, snapshot.counts)
                lines = _lines(snapshot, pace)
                show([_headline(), *lines])
                print_result(_snapshot_document(snapshot, pace), more=True)
                next_pause = max(pause, _MIN_PAUSE_FACTOR * (snapshot.at - started))
            except (DatabaseFailed, TimeoutError) as exc:
                show([f"{_headline()}: the database is unavailable, retrying: {exc}", *lines])
                document = {"error": f"the database is unavailable: {mask(str(exc))}", "status": 1}
                print_result(document, more=True)
                next_pause = pause
            time.sleep(next_pause)


def _query(database: Database, selection: Selection) -> _Snapshot:
    return _Snapshot(
        counts=database.runs.counts(selection),
        notifications=(database.outbox.notifications(), database.outbox.notifications(webhooks=True)),
        claims_by_worker=database.runs.claims_by_worker(selection),
        running=[run for run in database.runs.last_runs(_MAX_RUNNING) if run.status == "running"],
        at=time.monotonic(),
    )


def _lines(snapshot: _Snapshot, pace: Pace) -> list[str]:
    workers = _worker_lines(snapshot.claims_by_worker, snapshot.running)
    more = [f"  … and {len(workers) - _MAX_WORKERS} more"] if len(workers) > _MAX_WORKERS else []
    return [
        *prompt_lines(snapshot.counts),
        *delivery_lines(snapshot.counts, *snapshot.notifications),
        f"pace        {pace}",
        *(["workers:", *workers[:_MAX_WORKERS], *more] if workers else ["no workers"]),
    ]


def _snapshot_document(snapshot: _Snapshot, pace: Pace) -> dict[str, object]:
    _, images_per_second, left = pace.figures or (0.0, None, None)
    workers = [
        {
            "worker": claims.worker,
            "prompts": claims.prompts,
            "expired": claims.expired,
            "lease_until": claims.lease_until,
        }
        for claims in snapshot.claims_by_worker
    ]
    return {
        **status_document(snapshot.counts, *snapshot.notifications),
        "time": datetime.now(UTC),
        "images_per_second": images_per_second,
        "seconds_left": left,
        "workers": workers,
        "runs": [run_document(run) for run in snapshot.running],
    }


def _worker_lines(claims_by_worker: Sequence[WorkerClaims], running: Sequence[Run]) -> list[str]:
    """Return a line for each worker with claims or a running run: its heartbeat or lease, and its claims."""
    claims, runs = (
        {worker.worker: worker for worker in claims_by_worker},
        {run.worker or run.id: run for run in running},
    )
    names = sorted({*claims, *runs})
    shown = list(map(shorten, names))
    width = max(map(len, shown), default=0)
    states = [_worker_state(claims.get(name), runs.get(name)) for name in names]
    return [f"  {name:<{width}}  {state}" for name, state in zip(shown, states, strict=True)]


def _worker_state(claims: WorkerClaims | None, run: Run | None) -> str:
    prompts, expired = (claims.prompts, claims.expired) if claims else (0, 0)
    expired_text = f", {expired:,} of their leases expired" if expired else ""
    run_text = f", run {shorten(run.id)}" if run else ""
    return f"{_liveness(claims, run)}; {prompts:,} prompts claimed{expired_text}{run_text}"


def _liveness(claims: WorkerClaims | None, run: Run | None) -> str:
    """Return the age of the run's last heartbeat; without a heartbeat, the end of the worker's lease."""
    if run is not None and run.seen_at is not None and run.alive_until is not None:
        gone = " (gone)" if run.alive_until < datetime.now(UTC) else ""
        return f"last heartbeat {age(run.seen_at)} ago{gone}"
    until = claims.lease_until if claims else None
    if until is None:
        return "no lease"
    left = (until - datetime.now(UTC)).total_seconds()
    return f"lease expires in {duration(left)}" if left > 0 else f"lease expired {age(until)} ago"


def _headline() -> str:
    return f"{datetime.now(UTC).astimezone():%Y-%m-%d %H:%M:%S}"


@contextmanager
def _screen() -> Iterator[Callable[[list[str]], None]]:
    """Yield a function that shows lines: a terminal is updated in place, other output is appended."""
    if prints_json() or not can_redraw(sys.stdout):
        yield lambda lines: print_lines(*lines, "", flush=True)
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), auto_refresh=False) as live:
        yield lambda lines: live.update(Text("\n".join(map(escape, lines))), refresh=True)


def _done(counts: Counts) -> int:
    return counts.completed + counts.error


_MAX_RUNS = 5
_MIN_PAUSE, _MAX_PAUSE = 0.1, 86_400.0  # seconds


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Print the status, and return the exit status."""
    del progress
    if arguments.watch is not None:
        return _watch(settings, arguments)
    if arguments.plot or arguments.plot_file:
        return _plot(settings, arguments.plot, arguments.plot_file)
    with closing(build.database(settings, create=False)) as database:
        counts = database.runs.counts(build.selection(settings))
        callbacks = database.outbox.notifications()
        webhooks = database.outbox.notifications(webhooks=True)
        runs = database.runs.last_runs(_MAX_RUNS)
    lines = [*prompt_lines(counts), *delivery_lines(counts, callbacks, webhooks), *_run_lines(runs)]
    print_lines(*lines)
    runs_listed = [run_document(run) for run in runs]
    print_result({**status_document(counts, callbacks, webhooks), "runs": runs_listed})
    return 0


def _watch(settings: Settings, arguments: argparse.Namespace) -> int:
    """Show the status until the process is stopped; raise ConfigurationError for an invalid pause."""
    if arguments.plot or arguments.plot_file:
        raise ConfigurationError("--watch and --plot exclude each other; give only one of them")
    try:
        pause = float(arguments.watch)
    except ValueError:
        pause = math.nan
    if not _MIN_PAUSE <= pause <= _MAX_PAUSE:
        raise ConfigurationError(
            f"--watch must be a number of seconds from {_MIN_PAUSE:g} to {_MAX_PAUSE:g};"
            f" it is {arguments.watch[:60]!r}"
        )
    return watch(settings, pause)


def _plot(settings: Settings, run_id: str | None, file: str | None) -> int:
    """Plot the time of one run by stage, in the terminal or in a file; return the exit status."""
    if not run_id:
        raise ConfigurationError("--plot-file needs --plot RUN or --plot last")
    ending = Path(file or "").suffix.lower()
    if file and ending not in timing_plot.ENDINGS:
        raise ConfigurationError(
            f"--plot-file must end in one of {', '.join(timing_plot.ENDINGS)}; it is {file[:200]!r}"
        )
    with closing(build.database(settings, create=False)) as database:
        run = next(iter(database.runs.last_runs(1)), None) if run_id == "last" else database.runs.run(run_id)
    if run is None:
        raise ConfigurationError(f"there is no run {run_id!r}; status without --plot lists the last ones")
    if not file:
        print_lines(*timing_plot.in_terminal(run))
        print_result({"status": 0, "run": run_document(run)})
        return 0
    try:
        Path(file).write_bytes(timing_plot.file_content(run, ending))
    except OSError as exc:
        raise ConfigurationError(f"--plot-file {file} cannot be written: {exc.strerror}") from exc
    print_lines(f"plot of {run.id} written to {file}")
    print_result({"status": 0, "run": run_document(run), "file": file})
    return 0


def _run_lines(runs: list[Run]) -> list[str]:
    if not runs:
        return ["no runs yet"]
    names = [(shorten(run.id), shorten(state_of(run))) for run in runs]
    id_width, state_width = (max(map(len, column)) for column in zip(*names, strict=True))
    return ["last runs:"] + [
        f"  {name:<{id_width}}  {run.started_at:%Y-%m-%d %H:%M}  {state:<{state_width}}  "
        f"{run.completed:,} completed{_images(run)}, {run.failed:,} failed, "
        f"{run.images_per_second:.2f} images/s{_cost(run)}"
        for (name, state), run in zip(names, runs, strict=True)
    ]


def _images(run: Run) -> str:
    """Return the number of images, if it differs from the number of completed prompts."""
    return f" ({run.images:,} images)" if run.images > run.completed else ""


def _cost(run: Run) -> str:
    cost = run.dollars_per_1000_images
    return "" if cost is None else f", {dollars(cost)}"
