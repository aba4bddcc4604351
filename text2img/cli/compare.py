"""``compare RUN_A RUN_B``: the same prompts under two configurations, side by side."""

from __future__ import annotations

import os
import tempfile
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from text2img.databases import Selection
from text2img.errors import ConfigurationError, ObjectUnreadable
from text2img.reports.comparison import Comparison, Side, matched, pictures_of
from text2img.reports.comparison.html import page
from text2img.reports.comparison.similarity import check, measure_pairs
from text2img.reports.comparison.table import document, table
from text2img.reports.gallery.page import quiet
from text2img.settings import DATABASE_NAME
from text2img.storage import ImageReader, StorageOptions
from text2img.worker import build

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable

    import numpy as np
    from numpy.typing import NDArray

    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a run is looked for: ``name`` may be shown, ``url`` may hold a password."""

    name: str
    url: str
    run_id: str | None = None


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Compare; print the table, or JSON where standard output is for that; the exit status."""
    del progress
    check()
    for flag, file in (("--json", arguments.json), ("--html", arguments.html)):
        _check_file(flag, file)
    places = [_place(settings, run) for run in (arguments.run_a, arguments.run_b)]
    a, b = (_side(settings, place) for place in places)
    read, clip = _reader(settings), _clip(arguments.clip)
    with quiet():
        found = Comparison(a=a, b=b, pairs=measure_pairs(matched(a.pictures, b.pictures), read, clip))
        if arguments.html:
            folder = Path(arguments.html).absolute().parent
            _write("--html", arguments.html, page(found, read, folder))
    if arguments.json and arguments.json != "-":
        _write("--json", arguments.json, [document(found)])
    print(
        document(found) if arguments.json == "-" else table(found), end="" if arguments.json == "-" else "\n"
    )
    return 0


def _place(settings: Settings, run: str) -> _Place:
    """What a RUN means; raises ConfigurationError for what is none."""
    before, _, behind = run.rpartition("#")
    where, run_id = (before, behind) if before and not Path(run).is_dir() else (run, None)
    if "://" in where:
        scheme, _, rest = where.partition("://")
        shown = f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"
        return _Place(name=_named(shown, run_id), url=where, run_id=run_id)
    if Path(where).is_dir():
        file = Path(where) / DATABASE_NAME
        if not file.is_file():
            raise ConfigurationError(
                f"there is no {DATABASE_NAME} in the folder {where}; name one that a run made"
            )
        url = f"sqlite:///{quote(str(file.absolute()))}"
        return _Place(name=_named(where, run_id), url=url, run_id=run_id)
    if run_id is not None or "/" in run or not run:
        raise ConfigurationError(
            f"{where!r} is no folder; name a run's id, a folder with {DATABASE_NAME}, or a database's URL"
        )
    try:
        return _Place(name=run, url=settings.database_url, run_id=run)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{run!r} is no folder, and to find a run of that id: {exc}") from None


def _named(where: str, run_id: str | None) -> str:
    return where if run_id is None else f"{where} #{run_id}"


def _side(settings: Settings, place: _Place) -> Side:
    """The pictures that a run made, or all that are in the place, and the runs that made them."""
    with closing(build.database(settings, url=place.url, create=False)) as database:
        made = list(database.completed(Selection(), place.run_id))
        named = [place.run_id] if place.run_id else dict.fromkeys(one.run_id for one in made if one.run_id)
        runs = [run for run in map(database.run, named) if run is not None]
    if not made:
        raise ConfigurationError(_nothing(place, known=bool(runs)))
    pictures = sorted(
        (image for one in made for image in pictures_of(one)),
        key=lambda image: (image.prompt.kind, image.prompt.text, image.number),
    )
    return Side(name=place.name, runs=tuple(runs), pictures=tuple(pictures))


def _nothing(place: _Place, *, known: bool) -> str:
    if place.run_id is None:
        return f"there are no pictures in {place.name}; run it first"
    if known:
        return (
            f"no prompt carries the run {place.run_id} any more: in one database each has its latest run only"
        )
    where = place.name.removesuffix(f" #{place.run_id}") if "#" in place.name else "that database"
    return f"there is no run {place.run_id!r} in {where}; status lists the last ones"


def _reader(settings: Settings) -> Callable[[str], bytes]:
    """Reads a picture from the output that is named, if one is, else from where its URL says."""
    options = StorageOptions(s3_endpoint=settings.s3_endpoint)
    named = settings.output_dir or settings.output or settings.gcs_bucket or settings.s3_bucket
    storages = [build.storage(settings), None] if named else [None]
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
    """Find out before there is work whether the file could be written."""
    if file == "-" and flag == "--html":
        raise ConfigurationError("--html - would mix the page with the table; name a file")
    if file and file != "-" and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
        raise ConfigurationError(f"{flag} {file} cannot be written: it is a folder, or in none that is there")


def _write(flag: str, file: str, pieces: Iterable[str]) -> None:
    """Write the file: whole, or not at all."""
    target = Path(file).absolute()
    try:
        descriptor, aside = tempfile.mkstemp(prefix=".text2img-", dir=target.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as written:
                written.writelines(pieces)
            Path(aside).chmod(0o644)
            Path(aside).replace(target)
        finally:
            with suppress(FileNotFoundError):
                Path(aside).unlink()
    except OSError as exc:
        raise ConfigurationError(f"{flag} {file} cannot be written: {exc.strerror}") from exc
