"""Objects of a bucket into a folder: in pieces, several at a time, each file checked as it lies on the disk.

Every piece is asked for by its object's version, so that an object that changes meanwhile is refused by the
service. A file is checked by its size and by the service's sum of it, where it tells one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from text2img.concurrency.file_locks import ALONE, SHARED, locked, try_lock
from text2img.engine import hub
from text2img.errors import ConfigurationError, ModelFailed, StorageFailed
from text2img.storage import StorageOptions, locate, open_bucket
from text2img.storage.bucket import PermanentError, TransientError, Waiting, retry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from text2img.engine import EngineOptions
    from text2img.storage.bucket import ListEntry, ReadableBucket


log = logging.getLogger(__name__)

_THREADS: Final = 8
_PIECE: Final = 16 * 2**20  # bytes; so many times eight are in memory at the most
_READ: Final = 2**20
_LOOK: Final = 0.5  # seconds between looks whether the run is to end


class Download:
    """The objects of ``files``, by their names in a folder.

    ``go_on(seconds)`` sleeps, and raises when the run is to end; a bucket that falters is asked again for
    ``patience`` seconds, which ``clock()`` counts.
    """

    def __init__(
        self,
        bucket: ReadableBucket,
        files: Mapping[str, ListEntry],
        check_cancelled: Callable[[float], None],
        patience: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bucket, self._files = bucket, files
        self._persist = partial(retry, patience=patience, timeout=0, sleep=check_cancelled, clock=clock)
        self._go_on = check_cancelled

    def into(self, folder: Path) -> None:
        """Fetch all into the folder, which is empty, and check them.

        Raises what the bucket does, ModelFailed for a file that is not what the bucket says it is, OSError.
        """
        total = sum(listed.size for listed in self._files.values())
        log.info("fetching %d files of a model, %.1f MB", len(self._files), total / 1e6)
        for name, listed in self._files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("wb") as file:
                file.truncate(listed.size)
        self._all(
            partial(self._fetch, folder / name, listed, start)
            for name, listed in self._files.items()
            for start in range(0, listed.size, _PIECE)
        )
        self._all(partial(self._check, folder / name, listed) for name, listed in self._files.items())

    def _all(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Carry them out, several at a time; the first failure ends it."""
        with ThreadPoolExecutor(_THREADS, "model") as pool:
            try:
                pending = {pool.submit(task) for task in tasks}
                while pending:
                    self._go_on(0)
                    done, pending = wait(pending, _LOOK, FIRST_EXCEPTION)
                    for each in done:
                        each.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, file: Path, listed: ListEntry, start: int) -> None:
        self._go_on(0)
        end = min(start + _PIECE, listed.size)

        def attempt(_: float) -> bytes:
            data = self._bucket.read(listed.path, listed.version, start, end)
            if len(data) != end - start:
                raise TransientError(f"{listed.path} came with {len(data)} bytes instead of {end - start}")
            return data

        data = self._persist(attempt)
        with file.open("r+b") as opened:
            opened.seek(start)
            opened.write(data)

    def _check(self, file: Path, listed: ListEntry) -> None:
        summed = self._persist(lambda _: self._bucket.sum(listed))
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            if summed is None:
                log.info("the service tells no sum of %s; only its size is known", listed.path)
                return
            being_made, told = summed
            while data := opened.read(_READ):
                self._go_on(0)
                being_made.update(data)
        if being_made.digest() != told:
            raise ModelFailed(
                f"{listed.path} came with another checksum than its bucket tells of; run it again, and should"
                " it stay so, upload the file again"
            )


_PART: Final = "part-"
_LOCK: Final = "lock"


class Snapshots:
    """The copies in ``folder``. ``wait(seconds)`` sleeps, and raises when the run is to end."""

    def __init__(self, folder: Path, wait: Callable[[float], None]) -> None:
        self._folder, self._wait = folder, wait
        self._queued = False
        self._held: list[int] = []  # open descriptors, until the process ends

    def find(self, revision: str, sizes: Mapping[str, int]) -> Path | None:
        """The copy, if it is there with all these files of these sizes; from now on nobody removes it."""
        copy = self._folder / revision
        return copy if self._hold(copy) and all(_size(copy / name) == sizes[name] for name in sizes) else None

    def latest(self) -> Path | None:
        """The copy that was used last, whatever it is of."""
        there = sorted(self._others(""), key=lambda copy: copy.stat().st_mtime, reverse=True)
        return next((copy for copy in there if self._hold(copy)), None)

    def add(self, revision: str, sizes: Mapping[str, int], fetch: Callable[[Path], None]) -> Path:
        """The copy, made by ``fetch(folder)`` unless somebody else has made it meanwhile; others that nobody
        uses are removed. Raises OSError, ModelFailed for too little room, and what ``fetch`` does.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(self._folder / _LOCK, self._queue):
            there = self.find(revision, sizes)
            if there is not None:
                return there
            for torn in self._folder.glob(f"{_PART}*"):  # of processes that were killed
                shutil.rmtree(torn, ignore_errors=True)
            self._check_room(sum(sizes.values()))
            copy = self._make(revision, fetch)
            self._hold(copy)
            for old in self._others(revision):
                _remove(old)
        return copy

    def _queue(self, seconds: float) -> None:
        """Wait for whoever makes a copy just now."""
        if not self._queued:
            log.info("another process fetches this model; waiting for it")
        self._queued = True
        self._wait(seconds)

    def _make(self, revision: str, fetch: Callable[[Path], None]) -> Path:
        part, copy = Path(tempfile.mkdtemp(dir=self._folder, prefix=_PART)), self._folder / revision
        try:
            fetch(part)
            for folder, _, _ in os.walk(part):
                _sync(Path(folder))
            if copy.exists():  # but not whole: somebody has meddled with it
                shutil.rmtree(copy)
            part.rename(copy)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _sync(self._folder)
        return copy

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise ModelFailed(
                f"the model has {needed / 1e9:.1f} GB and {self._folder} room for {free / 1e9:.1f}; make room"
                " or name another folder by --model-cache"
            )

    def _others(self, revision: str) -> list[Path]:
        there = self._folder.iterdir() if self._folder.is_dir() else ()
        return [each for each in there if each.is_dir() and each.name != revision and _PART not in each.name]

    def _hold(self, copy: Path) -> bool:
        """Keep it from being removed; False where it is not there. It counts as used."""
        try:
            descriptor = os.open(copy, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return False
        if not try_lock(descriptor, SHARED) or not copy.is_dir():  # it is being removed
            os.close(descriptor)
            return False
        self._held.append(descriptor)
        with suppress(OSError):  # a folder that others fill may be mounted for reading only
            os.utime(copy)
        return True


def _remove(copy: Path) -> None:
    descriptor = os.open(copy, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if try_lock(descriptor, ALONE):
            log.info("removing %s, which the bucket no longer has and nobody uses", copy)
            shutil.rmtree(copy, ignore_errors=True)
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    """What the folder lists is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1


PATIENCE: Final = 20.0
"""Seconds that a bucket which does not answer is asked again."""
_INDEX: Final = "model_index.json"
_LARGEST_INDEX: Final = 1_000_000  # bytes; real ones have a thousand
_MOST: Final = 10_000  # objects in a model's folder; a pipeline of many variants has a hundred
_CHANGED: Final = (404, 412)  # what HTTP answers where an object is not, or not any more, what was listed
_TRY: Final = 5.0  # seconds for one request's own tries


class ModelCache:
    """The folder that keeps models from buckets; finds any model, those too that are in none.

    ``wait(seconds)`` sleeps, and raises when the run is to end; ``clock()`` counts the seconds of the
    patience.
    """

    def __init__(
        self,
        folder: Path,
        wait: Callable[[float], None] = time.sleep,
        *,
        s3_endpoint: str | None = None,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._wait, self._patience, self._clock = folder, wait, patience, clock
        self._endpoint, self._try = s3_endpoint, min(_TRY, patience)
        self._held: list[Snapshots] = []  # what is in use must not be removed

    def find(self, options: EngineOptions) -> tuple[Path, str | None]:
        """The model's folder on this machine and its revision: the hub's commit, a hash of a bucket's files.

        A copy that is what the bucket has is used as it is; of a bucket that cannot be reached, the latest.
        Raises ConfigurationError where the bucket or the folder in it is not there, ModelFailed where what is
        there is no model or cannot be fetched whole, and what ``wait`` does.
        """
        place = locate(options.model, "--model-id (or model_path)")
        if place is None:
            return hub.find(options)
        if options.revision:
            raise ConfigurationError(
                f"{options.model} has no revisions; leave out --model-revision, or the configuration's"
            )
        kind, name, prefix = place
        copies = Snapshots(self._folder / _digest(options), self._wait)
        self._held.append(copies)
        try:
            endpoint, clock = StorageOptions(s3_endpoint=self._endpoint), Waiting(self._wait, self._clock)
            bucket = open_bucket(kind, name, endpoint, self._try, clock=clock)
            ask = partial(retry, patience=self._patience, timeout=0, sleep=self._wait, clock=self._clock)
            sought = ask(lambda _: _FileSelection.of(bucket, prefix, options))
        except PermanentError as exc:
            raise ConfigurationError(_refused(options.model, exc)) from exc
        except TransientError as exc:
            return _latest(copies, options.model, exc)
        return self._fetched(bucket, sought, copies, options.model), sought.revision

    def _fetched(self, bucket: ReadableBucket, sought: _FileSelection, copies: Snapshots, url: str) -> Path:
        """The copy of these files, made where there is none."""
        sizes = {name: listed.size for name, listed in sought.files.items()}
        download = Download(bucket, sought.files, self._wait, self._patience, self._clock)
        try:
            return copies.find(sought.revision, sizes) or copies.add(sought.revision, sizes, download.into)
        except OSError as exc:
            raise ModelFailed(
                f"{url} cannot be kept in {self._folder} ({exc.strerror}); name another by --model-cache"
            ) from exc
        except PermanentError as exc:
            raise ModelFailed(f"{url} could not be fetched: {_meaning(exc)}") from exc
        except StorageFailed as exc:
            raise ModelFailed(f"{url} could not be fetched: {exc}") from exc


@dataclass(frozen=True, slots=True)
class _FileSelection:
    """The objects that a load will read, by their names in the model's folder."""

    files: Mapping[str, ListEntry]

    @classmethod
    def of(cls, bucket: ReadableBucket, prefix: str, options: EngineOptions) -> _FileSelection:
        """Those of a bucket's folder. Raises what the bucket does, and ModelFailed for what is no model."""
        url = options.model
        found = bucket.objects(prefix, _MOST + 1)
        if not found:
            raise ConfigurationError(f"there is nothing at {url}; check the bucket's name and the folder's")
        if len(found) > _MOST:
            raise ModelFailed(f"{url} holds more than {_MOST:,} objects; name the model's own folder")
        there = _by_name(found, prefix, url)
        if _INDEX not in there:
            raise ModelFailed(f"{url} is no model in diffusers' format: it has no {_INDEX}")
        index = _index(bucket, there[_INDEX], url)
        return cls({name: there[name] for name in hub.wanted_files(list(there), index, options)})

    @property
    def revision(self) -> str:
        """A hash of names, sizes and the service's sums: the same for the same files, wherever they are."""
        files = sorted((name, each.size, each.checksum) for name, each in self.files.items())
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:40]


def _by_name(found: Iterable[ListEntry], prefix: str, url: str) -> dict[str, ListEntry]:
    """The objects by their names below the prefix, all of which could be files of a folder.

    Consoles mark folders by empty objects that end in a slash: those are passed over.
    """
    named = {each.path[len(prefix) :]: each for each in found}
    files = {name: each for name, each in named.items() if name and not (name[-1] == "/" and not each.size)}
    for name in files:
        odd = any(char == "\\" or not char.isprintable() for char in name)
        if odd or any(part.strip() in {"", ".", ".."} for part in name.split("/")):
            raise ModelFailed(
                f"{url} holds {name[:200]!r}, which is no name that a file in a model's folder could have;"
                " look who writes there, and remove it"
            )
    return files


def _index(bucket: ReadableBucket, listed: ListEntry, url: str) -> dict[str, object]:
    index = None
    try:
        if 0 < listed.size <= _LARGEST_INDEX:
            index = json.loads(bucket.read(listed.path, listed.version, 0, listed.size))
    except ValueError:
        pass
    except PermanentError as exc:
        if exc.status not in _CHANGED:
            raise
        raise ModelFailed(f"{url} could not be fetched: {_meaning(exc)}") from exc
    if not isinstance(index, dict):
        raise ModelFailed(f"{url}/{_INDEX} cannot be read as JSON; upload the model again")
    return index


def _latest(copies: Snapshots, url: str, exc: TransientError) -> tuple[Path, str]:
    latest = copies.latest()
    if latest is None:
        raise ModelFailed(f"{url} cannot be looked at, and this machine has no copy: {exc}") from exc
    log.warning("%s cannot be looked at (%s); the latest copy of it is used", url, exc)
    return latest, latest.name


def _meaning(exc: PermanentError) -> str:
    """Of a refusal to read what the bucket has just listed."""
    return "it changed meanwhile; run it again" if exc.status in _CHANGED else f"the bucket answers {exc}"


def _refused(url: str, exc: PermanentError) -> str:
    if exc.status == 404:
        return f"there is no bucket for {url}; check its name"
    if exc.status in {401, 403}:
        return f"this account may not list and read {url} ({exc}); grant it, and check the bucket's name"
    return f"{url} cannot be read: its bucket answers {exc}"


def _digest(options: EngineOptions) -> str:
    """What tells apart models, and the sets of files that are read of one."""
    asked = (options.model.rstrip("/"), options.variant, options.safety_checker)
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:40]
