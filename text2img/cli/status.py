"""``status``: where the prompts stand, whose leases run, what is still to be told, and the last runs."""

from __future__ import annotations

import math
from contextlib import closing
from typing import TYPE_CHECKING

from text2img.cli import status_lines, timing_plot
from text2img.databases.documents import state_of
from text2img.errors import ConfigurationError
from text2img.worker import build
from text2img.worker.summary_line import dollars

if TYPE_CHECKING:
    import argparse

    from text2img.databases import Run
    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress

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
        notices = database.notices()
        own = database.notices(webhooks=True)
        runs = database.last_runs(_RUNS_SHOWN)
    print("\n".join([*status_lines.prompts(counts), *status_lines.told(counts, notices, own), *_runs(runs)]))
    return 0


def _watch(settings: Settings, arguments: argparse.Namespace) -> int:
    """Show it until somebody stops that; raises ConfigurationError for a pause that is none."""
    from text2img.cli.watch import watch

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
        print(timing_plot.in_terminal(run))
        return 0
    try:
        timing_plot.as_picture(run).save(file, "PNG")
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
