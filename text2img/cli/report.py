"""``report``: one HTML file with what was made, what failed, and how the runs went."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Final

from text2img.errors import ConfigurationError
from text2img.reports.gallery import ReportData, write_report
from text2img.storage import ImageReader, StorageOptions
from text2img.worker import build

if TYPE_CHECKING:
    import argparse

    from text2img.databases import Database, Run
    from text2img.reports.gallery import ReportStats
    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress

_RUNS: Final = 200
"""The latest runs, which is as many as a plot can show."""


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Write it; the exit status."""
    del progress
    run_id = arguments.run_id or settings.run_id
    with closing(build.database(settings, create=False)) as database:
        contents = _contents(database, settings, run_id)
        written = write_report(arguments.html, contents, _reader(settings).read)
    print(_line(arguments.html, written))
    return 0


def _contents(database: Database, settings: Settings, run_id: str | None) -> ReportData:
    selection = build.selection(settings)
    waiting = None
    if run_id is None:
        counts = database.counts(selection)
        waiting = counts.pending + counts.processing
    return ReportData(
        what=_what(settings.dataset_id, run_id),
        made=database.completed(selection, run_id),
        failures=database.failures(selection, run_id),
        runs=_runs(database, run_id),
        waiting=waiting,
    )


def _runs(database: Database, run_id: str | None) -> list[Run]:
    if run_id is None:
        return database.last_runs(_RUNS)
    run = database.run(run_id)
    if run is None:
        raise ConfigurationError(f"there is no run {run_id!r}; status lists the last ones")
    return [run]


def _what(dataset_id: str | None, run_id: str | None) -> str:
    narrowed = {"data set": dataset_id, "run": run_id}
    return ", ".join(f"{kind} {name}" for kind, name in narrowed.items() if name) or "All prompts"


def _reader(settings: Settings) -> ImageReader:
    """Reads from the output alone where one is named, else from where the pictures' URLs say."""
    named = settings.output_dir or settings.output or settings.gcs_bucket or settings.s3_bucket
    options = StorageOptions(s3_endpoint=settings.s3_endpoint)
    return ImageReader(build.storage(settings) if named else None, options)


def _line(name: str, written: ReportStats) -> str:
    absent = f" ({written.unreadable:,} cannot be read, and say why)" if written.unreadable else ""
    return (
        f"{name}: {written.pictures:,} pictures{absent} of {written.prompts:,} prompts, "
        f"{written.failures:,} failed; {written.size / 1e6:.1f} MB"
    )
