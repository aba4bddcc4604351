"""``status``: where the prompts stand, whose leases run, what is still to be told, and the last runs."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from text2img.cli import parts, plot
from text2img.cli.last_line import dollars
from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    import argparse

    from text2img.databases import Counts, Run
    from text2img.progress import Progress
    from text2img.settings import Settings

_RUNS_SHOWN = 5


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Print it; the exit status."""
    del progress
    if arguments.plot or arguments.plot_file:
        return _plot(settings, arguments.plot, arguments.plot_file)
    with closing(parts.database(settings, create=False)) as database:
        counts = database.counts(parts.selection(settings))
        notices = database.notices()
        own = database.notices(webhooks=True)
        runs = database.last_runs(_RUNS_SHOWN)
    told = [_told("untold", counts.untold, "callbacks", notices)]
    if counts.owed or any(own):
        told.append(_told("webhooks", counts.owed, "notices", own))
    print("\n".join([*_prompts(counts), *told, *_runs(runs)]))
    return 0


def _plot(settings: Settings, run_id: str | None, file: str | None) -> int:
    """Show where the time of one run went, in the terminal or in a file; the exit status."""
    if not run_id:
        raise ConfigurationError("--plot-file needs --plot RUN, or --plot last, beside it")
    with closing(parts.database(settings, create=False)) as database:
        run = next(iter(database.last_runs(1)), None) if run_id == "last" else database.run(run_id)
    if run is None:
        raise ConfigurationError(f"there is no run {run_id!r}; status without --plot lists the last ones")
    if not file:
        print(plot.in_terminal(run))
        return 0
    try:
        plot.as_picture(run).save(file, "PNG")
    except OSError as exc:
        raise ConfigurationError(f"--plot-file {file} cannot be written: {exc.strerror}") from exc
    print(f"where the time of {run.id} went: {file}")
    return 0


def _prompts(counts: Counts) -> list[str]:
    oldest = f"  (oldest {_age(counts.oldest_pending)} old)" if counts.oldest_pending else ""
    live, expired = counts.live_leases, counts.expired_leases
    errors = ", ".join(f"{code} {count}" for code, count in sorted(counts.errors.items()))
    return [
        f"pending     {counts.pending:>8,}{oldest}",
        f"processing  {counts.processing:>8,}  (leases: {live:,} live, {expired:,} expired)",
        f"completed   {counts.completed:>8,}",
        f"error       {counts.error:>8,}" + (f"  ({errors})" if errors else ""),
    ]


def _told(what: str, outcomes: int, kind: str, notices: tuple[int, int]) -> str:
    due, refused = notices
    return f"{what:<11} {outcomes:>8,}  ({kind}: {due:,} still to be told, {refused:,} refused for good)"


def _runs(runs: list[Run]) -> list[str]:
    if not runs:
        return ["no runs yet"]
    width = max(len(run.id) for run in runs)
    wide = max(len(_status(run)) for run in runs)
    return ["last runs:"] + [
        f"  {run.id:<{width}}  {run.started_at:%Y-%m-%d %H:%M}  {_status(run):<{wide}}  "
        f"{run.completed:,} completed{_several(run)}, {run.failed:,} failed, "
        f"{run.images_per_second:.2f} images/s{_cost(run)}"
        for run in runs
    ]


def _status(run: Run) -> str:
    """How it stands; of one that gives no sign of life any more its document cannot say."""
    gone = run.status == "running" and run.alive_until is not None and run.alive_until < datetime.now(UTC)
    return "interrupted" if gone else run.status


def _several(run: Run) -> str:
    """How many pictures the completed prompts have, where that is another number."""
    return f" ({run.images:,} pictures)" if run.images > run.completed else ""


def _cost(run: Run) -> str:
    cost = run.dollars_per_1000_images
    return "" if cost is None else f", {dollars(cost)}"


def _age(moment: datetime) -> str:
    """How long ago, in its largest unit."""
    seconds = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
