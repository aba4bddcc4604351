"""``compare RUN_A RUN_B``: compare two runs over the same prompts."""

from __future__ import annotations

import os
import tempfile
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from text2img.databases import Selection
from text2img.databases.sqlite import folder_of
from text2img.errors import ConfigurationError, ObjectUnreadable
from text2img.reports.comparison import Comparison, Side, images_of, match_images
from text2img.reports.comparison.similarity import check, measure_pairs
from text2img.reports.comparison.table import document, page, table
from text2img.reports.gallery.page import quiet
from text2img.settings import DATABASE_NAME
from text2img.storage import ImageReader, StorageOptions, find_moved
from text2img.telemetry.terminal import print_document, print_lines
from text2img.worker import build

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable

    import numpy as np
    from numpy.typing import NDArray

    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class _RunLocation:
    """The database of a run, and the run's id; ``name`` may be shown, ``url`` may contain a password."""

    name: str
    url: str
    run_id: str | None = None


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Print the comparison as a table, or as JSON with ``--json -``, and return the exit status."""
    del progress
    check()
    for flag, file in (("--json", arguments.json), ("--html", arguments.html)):
        _check_file(flag, file)
    locations = [_locate(settings, run) for run in (arguments.run_a, arguments.run_b)]
    a, b = (_side(settings, location) for location in locations)
    read, clip = _reader(settings), _clip(arguments.clip)
    with quiet():
        comparison = Comparison(a=a, b=b, pairs=measure_pairs(match_images(a.images, b.images), read, clip))
        if arguments.html:
            folder = Path(arguments.html).absolute().parent
            _write("--html", arguments.html, page(comparison, read, folder))
    if arguments.json == "-":
        print_document(document(comparison))
        return 0
    if arguments.json:
        _write("--json", arguments.json, [document(comparison)])
    print_lines(*table(comparison))
    return 0


def _locate(settings: Settings, run: str) -> _RunLocation:
    """Return the location that a RUN argument means; raise ConfigurationError for an invalid one."""
    before, _, after = run.rpartition("#")
    where, run_id = (before, after) if before and not Path(run).is_dir() else (run, None)
    if "://" in where:
        scheme, _, rest = where.partition("://")
        shown = f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"
        return _RunLocation(name=_with_run(shown, run_id), url=where, run_id=run_id)
    if Path(where).is_dir():
        file = Path(where) / DATABASE_NAME
        if not file.is_file():
            raise ConfigurationError(
                f"there is no {DATABASE_NAME} in the folder {where}; use the output folder of a run"
            )
        url = f"sqlite:///{quote(str(file.absolute()))}"
        return _RunLocation(name=_with_run(where, run_id), url=url, run_id=run_id)
    if run_id is not None or "/" in run or not run:
        raise ConfigurationError(
            f"{where!r} is not a folder; use a run's id, a folder with {DATABASE_NAME}, or a database's URL"
        )
    try:
        return _RunLocation(name=run, url=settings.database_url, run_id=run)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{run!r} is not a folder, and to look it up as a run's id: {exc}") from None


def _with_run(where: str, run_id: str | None) -> str:
    return where if run_id is None else f"{where} #{run_id}"


def _side(settings: Settings, location: _RunLocation) -> Side:
    """Return the images of the run, or all in the database, and the runs that generated them."""
    with closing(build.database(settings, url=location.url, create=False)) as database:
        prompts = list(database.results.completed(Selection(), location.run_id))
        run_ids = (
            [location.run_id]
            if location.run_id
            else dict.fromkeys(prompt.run_id for prompt in prompts if prompt.run_id)
        )
        runs = [run for run in map(database.runs.run, run_ids) if run is not None]
    if not prompts:
        raise ConfigurationError(_no_images_message(location, run_exists=bool(runs)))
    folder = folder_of(location.url)
    images = sorted(
        (
            replace(image, moved_to=find_moved(image.url, folder))
            for prompt in prompts
            for image in images_of(prompt)
        ),
        key=lambda image: (image.prompt.kind, image.prompt.text, image.number),
    )
    return Side(name=location.name, runs=tuple(runs), images=tuple(images))


def _no_images_message(location: _RunLocation, *, run_exists: bool) -> str:
    if location.run_id is None:
        return f"there are no images in {location.name}; run it first"
    if run_exists:
        return (
            f"no prompt belongs to run {location.run_id} any more: a database keeps only the latest run of"
            " each prompt"
        )
    where = location.name.removesuffix(f" #{location.run_id}") if "#" in location.name else "that database"
    return f"there is no run {location.run_id!r} in {where}; status lists the last ones"


def _reader(settings: Settings) -> Callable[[str], bytes]:
    """Return a function that reads an image from the output, if one is set, else from its URL."""
    options = StorageOptions(s3_endpoint=settings.s3_endpoint)
    has_output = settings.output_dir or settings.output or settings.gcs_bucket or settings.s3_bucket
    storages = [build.storage(settings), None] if has_output else [None]
    readers = [ImageReader(storage, options) for storage in storages]

    def read(url: str) -> bytes:
        for reader in readers[:-1]:
            with suppress(ObjectUnreadable):
                return reader.read(url)
        return readers[-1].read(url)

    return read


def _clip(model: str | None) -> Callable[[NDArray[np.uint8], NDArray[np.uint8]], float] | None:
    if not model:
        return None
    from text2img.evaluation.clip import ClipEvaluator

    evaluator = ClipEvaluator(model)
    evaluator.check()
    evaluator.load()
    return evaluator.similarity


def _check_file(flag: str, file: str | None) -> None:
    """Raise ConfigurationError, before any work, if the file could not be written."""
    if file == "-" and flag == "--html":
        raise ConfigurationError("--html - would mix the page with the table; name a file")
    if file and file != "-" and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
        raise ConfigurationError(
            f"{flag} {file} cannot be written: it is a folder, or its folder does not exist"
        )


def _write(flag: str, file: str, pieces: Iterable[str]) -> None:
    """Write the file atomically."""
    target = Path(file).absolute()
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=".text2img-", dir=target.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as opened:
                opened.writelines(pieces)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(target)
        finally:
            with suppress(FileNotFoundError):
                Path(temporary).unlink()
    except OSError as exc:
        raise ConfigurationError(f"{flag} {file} cannot be written: {exc.strerror}") from exc
