"""``report``: write one HTML file with the images, the failures, and the statistics of the runs."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Final

from text2img.databases.sqlite import folder_of
from text2img.errors import ConfigurationError
from text2img.reports.gallery import ReportData, write_report
from text2img.storage import ImageReader, StorageOptions, find_moved
from text2img.telemetry.terminal import print_lines
from text2img.worker import build

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from text2img.databases import Database, Run
    from text2img.reports.gallery import ReportStats
    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress

_MAX_RUNS: Final = 200
"""The latest runs; the plot cannot show more."""


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Write the report, and return the exit status."""
    del progress
    run_id = arguments.run_id or settings.run_id
    with closing(build.database(settings, create=False)) as database:
        data = _report_data(database, settings, run_id)
        locate = partial(find_moved, folder=folder_of(settings.database_url))
        stats = write_report(arguments.html, data, image_reader(settings, locate), locate)
    print_lines(_summary_line(arguments.html, stats))
    return 0


def _report_data(database: Database, settings: Settings, run_id: str | None) -> ReportData:
    selection = build.selection(settings)
    waiting = None
    if run_id is None:
        counts = database.runs.counts(selection)
        waiting = counts.pending + counts.processing
    return ReportData(
        what=_title(settings.dataset_id, run_id),
        made=database.results.completed(selection, run_id),
        failures=database.results.failures(selection, run_id),
        runs=_runs(database, run_id),
        waiting=waiting,
    )


def _runs(database: Database, run_id: str | None) -> list[Run]:
    if run_id is None:
        return database.runs.last_runs(_MAX_RUNS)
    run = database.runs.run(run_id)
    if run is None:
        raise ConfigurationError(f"there is no run {run_id!r}; status lists the last ones")
    return [run]


def _title(dataset_id: str | None, run_id: str | None) -> str:
    filters = {"data set": dataset_id, "run": run_id}
    return ", ".join(f"{kind} {name}" for kind, name in filters.items() if name) or "All prompts"


def image_reader(settings: Settings, locate: Callable[[str], str]) -> Callable[[str], bytes]:
    """Return a reader of the output if one is set, else of the images' URLs, and of files that were moved."""
    has_output = settings.output_dir or settings.output or settings.gcs_bucket or settings.s3_bucket
    options = StorageOptions(s3_endpoint=settings.s3_endpoint)
    usual, moved = (
        ImageReader(build.storage(settings) if has_output else None, options),
        ImageReader(None, options),
    )

    def read(url: str) -> bytes:
        place = locate(url)
        return usual.read(url) if place == url else moved.read(place)

    return read


def _summary_line(name: str, stats: ReportStats) -> str:
    unreadable = f" ({stats.unreadable:,} unreadable)" if stats.unreadable else ""
    return (
        f"{name}: {stats.images:,} images{unreadable} of {stats.prompts:,} prompts, "
        f"{stats.failures:,} failed; {stats.size / 1e6:.1f} MB"
    )
