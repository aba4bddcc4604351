"""A cache of models from buckets: download a model's files, verify them, and keep them as snapshots.

Objects are downloaded in chunks, several in parallel. Each chunk is requested by its object's version, so
that the service rejects an object that changes during the download. Each file on disk is verified by its size
and by the service's checksum, if it provides one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from text2img.concurrency.file_locks import EXCLUSIVE, SHARED, is_full, locked, try_lock
from text2img.engine import loading
from text2img.engine.single_file import file_name
from text2img.errors import ConfigurationError, ModelFailed, StorageFailed
from text2img.storage import StorageOptions, check_environment, locate, open_bucket
from text2img.storage.bucket import FunctionClock, PermanentError, TransientError, retry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from text2img.engine import EngineOptions
    from text2img.storage.bucket import ListEntry, ReadableBucket


log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_THREADS: Final = 8
_CHUNK_BYTES: Final = 16 * 2**20  # _THREADS of these are in memory at once
_READ_BYTES: Final = 2**20
_POLL_INTERVAL: Final = 0.5  # seconds between checks whether the run is stopped


class Download:
    """A download of the objects ``files``, by their names in the folder.

    ``check_cancelled(seconds)`` sleeps, and raises when the run is stopped. Transient errors are retried for
    ``retry_timeout`` seconds of ``clock()``.
    """

    def __init__(
        self,
        bucket: ReadableBucket,
        files: Mapping[str, ListEntry],
        check_cancelled: Callable[[float], None],
        retry_timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bucket, self._files = bucket, files
        self._retry = partial(
            retry, retry_timeout=retry_timeout, timeout=0, sleep=check_cancelled, clock=clock
        )
        self._check_cancelled = check_cancelled

    def into(self, folder: Path) -> None:
        """Download all files into the empty folder, and verify them.

        Raises the bucket's errors, ModelFailed for a file with a wrong checksum, and OSError.
        """
        total = sum(entry.size for entry in self._files.values())
        log.info("fetching %d files of a model, %.1f MB", len(self._files), total / 1e6)
        for name, entry in self._files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("wb") as file:
                file.truncate(entry.size)
        self._run_all(
            partial(self._fetch, folder / name, entry, start)
            for name, entry in self._files.items()
            for start in range(0, entry.size, _CHUNK_BYTES)
        )
        self._run_all(partial(self._check, folder / name, entry) for name, entry in self._files.items())

    def _run_all(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Run the tasks in parallel; raise the first failure."""
        with ThreadPoolExecutor(_THREADS, "model") as pool:
            try:
                pending = {pool.submit(task) for task in tasks}
                while pending:
                    self._check_cancelled(0)
                    done, pending = wait(pending, _POLL_INTERVAL, FIRST_EXCEPTION)
                    for future in done:
                        future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, file: Path, entry: ListEntry, start: int) -> None:
        self._check_cancelled(0)
        end = min(start + _CHUNK_BYTES, entry.size)

        def attempt(_: float) -> bytes:
            data = self._bucket.read(entry.path, entry.version, start, end)
            if len(data) != end - start:
                raise TransientError(f"{entry.path} came with {len(data)} bytes instead of {end - start}")
            return data

        data = self._retry(attempt)
        with file.open("r+b") as opened:
            opened.seek(start)
            opened.write(data)

    def _check(self, file: Path, entry: ListEntry) -> None:
        bucket_sum = self._retry(lambda _: self._bucket.checksum(entry))
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            if bucket_sum is None:
                log.info("the service has no checksum of %s; only its size is verified", entry.path)
                return
            checksum, expected = bucket_sum
            while data := opened.read(_READ_BYTES):
                self._check_cancelled(0)
                checksum.update(data)
        if checksum.digest() != expected:
            raise ModelFailed(
                f"{entry.path} arrived with another checksum than its bucket's; run it again, and if it fails"
                " again, upload the file again"
            )


_PART: Final = "part-"
_LOCK: Final = "lock"
_DIGEST = re.compile("[0-9a-f]{40}")  # the names of models' folders and of snapshots


class Snapshots:
    """The snapshots of one model in ``folder``.

    ``wait(seconds)`` sleeps, and raises when the run is stopped.
    """

    def __init__(self, folder: Path, wait: Callable[[float], None]) -> None:
        self._folder, self._wait = folder, wait
        self._logged_wait = False
        self._descriptors: list[int] = []  # open descriptors, until the process ends

    def find(self, revision: str, sizes: Mapping[str, int]) -> Path | None:
        """Return the snapshot, locked against removal, if all files are there in these sizes, else None."""
        snapshot = self._folder / revision
        if not self._lock_snapshot(snapshot):
            return None
        return snapshot if all(_size(snapshot / name) == sizes[name] for name in sizes) else None

    def latest(self) -> Path | None:
        """Return the snapshot that was used last, of any revision; None if there is none."""
        snapshots = sorted(self._others(""), key=lambda snapshot: snapshot.stat().st_mtime, reverse=True)
        return next((snapshot for snapshot in snapshots if self._lock_snapshot(snapshot)), None)

    def add(self, revision: str, sizes: Mapping[str, int], fetch: Callable[[Path], None]) -> Path:
        """Return the snapshot, downloaded by ``fetch(folder)`` unless another process has just done so.

        Other snapshots that no run uses are removed: the model's own afterwards, and all models' before, the
        least recently used first, as long as the disk has too little space. Raises OSError, ModelFailed if it
        still has too little, and what ``fetch`` raises.
        """
        self._with_room(self._prepare, revision)
        with locked(self._folder / _LOCK, self._wait_for_lock):
            existing = self.find(revision, sizes)
            if existing is not None:
                return existing
            for partial_folder in self._folder.glob(f"{_PART}*"):  # left by processes that were killed
                shutil.rmtree(partial_folder, ignore_errors=True)
            self._make_room(sum(sizes.values()), revision)
            snapshot = self._with_room(lambda: self._create(revision, fetch), revision)
            self._lock_snapshot(snapshot)
            for old in self._others(revision):
                _remove(old, "the bucket no longer has it")
        return snapshot

    def _wait_for_lock(self, seconds: float) -> None:
        """Wait for another process that is fetching, and log it once."""
        if not self._logged_wait:
            log.info("another process fetches this model; waiting for it")
        self._logged_wait = True
        self._wait(seconds)

    def _create(self, revision: str, fetch: Callable[[Path], None]) -> Path:
        part, snapshot = Path(tempfile.mkdtemp(dir=self._folder, prefix=_PART)), self._folder / revision
        try:
            fetch(part)
            for folder, _, _ in os.walk(part):
                _sync(Path(folder))
            if snapshot.exists():  # it is incomplete: its files were modified
                shutil.rmtree(snapshot)
            part.rename(snapshot)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _sync(self._folder)
        return snapshot

    def _prepare(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self._folder / _LOCK).touch()

    def _with_room(self, action: Callable[[], _Result], revision: str) -> _Result:
        """Return what ``action`` returns; if the disk is full, evict something and repeat it."""
        while True:
            try:
                return action()
            except OSError as exc:
                if not (is_full(exc) and self._evict_one(revision)):
                    raise

    def _make_room(self, needed: int, revision: str) -> None:
        """Remove snapshots that no run uses until ``needed`` bytes are free, or raise ModelFailed."""
        while (free := shutil.disk_usage(self._folder).free) < needed:
            if not self._evict_one(revision):
                raise ModelFailed(
                    f"the model needs {needed / 1e9:.1f} GB and {self._folder} has {free / 1e9:.1f} GB free;"
                    " free disk space or set another folder with --model-cache"
                )

    def _evict_one(self, revision: str) -> bool:
        """Remove the least recently used snapshot that no run uses, of any model; False if there is none.

        This model's own are the last: one of them is used if the bucket cannot be read.
        """
        folders = self._other_models()
        if any(map(_remove_parts, folders)):
            return True
        others = [child for folder in folders for child in folder.iterdir() if _DIGEST.fullmatch(child.name)]
        by_last_use = [*sorted(others, key=_last_used), *sorted(self._others(revision), key=_last_used)]
        return any(_remove(snapshot, "the disk is full") for snapshot in by_last_use)

    def _other_models(self) -> list[Path]:
        """Return the folders of the cache's other models."""
        return [
            folder
            for folder in self._folder.parent.iterdir()
            if folder != self._folder and _DIGEST.fullmatch(folder.name) and (folder / _LOCK).is_file()
        ]

    def _others(self, revision: str) -> list[Path]:
        children = self._folder.iterdir() if self._folder.is_dir() else ()
        return [
            child
            for child in children
            if child.is_dir() and child.name != revision and _PART not in child.name
        ]

    def _lock_snapshot(self, snapshot: Path) -> bool:
        """Lock the snapshot against removal and mark it as used; return False if it is missing."""
        try:
            descriptor = os.open(snapshot, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return False
        if not try_lock(descriptor, SHARED) or not snapshot.is_dir():  # it is being removed
            os.close(descriptor)
            return False
        self._descriptors.append(descriptor)
        with suppress(OSError):  # a folder shared by other machines may be mounted read-only
            os.utime(snapshot)
        return True


def _remove(snapshot: Path, reason: str) -> bool:
    """Remove the snapshot and return True, unless a run uses it."""
    try:
        descriptor = os.open(snapshot, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        if not try_lock(descriptor, EXCLUSIVE):
            return False
        log.info("removing %s: %s and no run uses it", snapshot, reason)
        shutil.rmtree(snapshot, ignore_errors=True)
        return not snapshot.exists()
    finally:
        os.close(descriptor)


def _remove_parts(folder: Path) -> bool:
    """Remove what killed processes have left of a model's downloads; return True if there was anything."""
    with suppress(OSError), (folder / _LOCK).open("ab") as opened:
        if try_lock(opened, EXCLUSIVE):  # else a process is fetching there
            parts = list(folder.glob(f"{_PART}*"))
            for part in parts:
                shutil.rmtree(part)
            return bool(parts)
    return False


def _last_used(snapshot: Path) -> float:
    try:
        return snapshot.stat().st_mtime
    except OSError:
        return 0.0


def _sync(folder: Path) -> None:
    """Flush the folder's entries to disk."""
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


RETRY_TIMEOUT: Final = 20.0
"""Seconds for which a bucket that does not answer is retried."""
_INDEX: Final = "model_index.json"
_MAX_INDEX_BYTES: Final = 1_000_000  # bytes; real ones have a thousand
_MAX_OBJECTS: Final = 10_000  # objects in a model's folder; a pipeline of many variants has a hundred
_CHANGED_STATUSES: Final = (404, 412)  # HTTP statuses for an object that differs from the listed one
_REQUEST_RETRY_TIMEOUT: Final = 5.0  # seconds for which the client library retries one request


class ModelCache:
    """The cache folder for models from buckets; it also finds models from folders and the hub.

    ``folder()`` is called only for a model from a bucket: it raises where the user has no home directory.
    ``wait(seconds)`` sleeps, and raises when the run is stopped; ``clock()`` counts the seconds of the retry
    timeout.
    """

    def __init__(
        self,
        folder: Callable[[], Path],
        wait: Callable[[float], None] = time.sleep,
        *,
        s3_endpoint: str | None = None,
        retry_timeout: float = RETRY_TIMEOUT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._wait, self._retry_timeout, self._clock = folder, wait, retry_timeout, clock
        self._endpoint, self._request_retry_timeout = s3_endpoint, min(_REQUEST_RETRY_TIMEOUT, retry_timeout)
        self._snapshots: list[Snapshots] = []  # keeps their locks: no other run must remove them

    def find(self, options: EngineOptions) -> tuple[Path, str | None]:
        """Return the model's local folder or file, and its revision: the hub's commit or the files' hash.

        A snapshot that equals the bucket's files is reused; if the bucket is unavailable, the latest one is.
        Raises ConfigurationError if the bucket or the folder in it does not exist, ModelFailed if it holds no
        model or the download fails, and what ``wait`` raises.
        """
        location = locate(options.model, "--model-id (or model_path)")
        if location is None:
            return loading.find(options)
        if options.revision:
            raise ConfigurationError(
                f"{options.model} has no revisions; leave out --model-revision, or the configuration's"
            )
        kind, name, prefix = location
        endpoint = StorageOptions(s3_endpoint=self._endpoint)
        check_environment(kind, endpoint)
        snapshots = Snapshots(self._folder() / _digest(options), self._wait)
        self._snapshots.append(snapshots)
        try:
            clock = FunctionClock(self._wait, self._clock)
            bucket = open_bucket(kind, name, endpoint, self._request_retry_timeout, clock=clock)
            with_retries = partial(
                retry, retry_timeout=self._retry_timeout, timeout=0, sleep=self._wait, clock=self._clock
            )
            selection = with_retries(lambda _: _FileSelection.of(bucket, prefix, options))
        except PermanentError as exc:
            raise ConfigurationError(_describe_list_error(options.model, exc)) from exc
        except TransientError as exc:
            snapshot = _latest_snapshot(snapshots, options.model, exc)
        else:
            snapshot = self._fetch_snapshot(bucket, selection, snapshots, options.model)
        return snapshot / file_name(options.model), snapshot.name

    def _fetch_snapshot(
        self, bucket: ReadableBucket, selection: _FileSelection, snapshots: Snapshots, url: str
    ) -> Path:
        """Return the snapshot of these files, downloaded if necessary."""
        sizes = {name: entry.size for name, entry in selection.files.items()}
        download = Download(bucket, selection.files, self._wait, self._retry_timeout, self._clock)
        try:
            return snapshots.find(selection.revision, sizes) or snapshots.add(
                selection.revision, sizes, download.into
            )
        except OSError as exc:
            raise ModelFailed(
                f"{url} cannot be stored in {self._folder} ({exc.strerror}); set another folder with"
                " --model-cache"
            ) from exc
        except PermanentError as exc:
            raise ModelFailed(f"{url} could not be fetched: {_describe_read_error(exc)}") from exc
        except StorageFailed as exc:
            raise ModelFailed(f"{url} could not be fetched: {exc}") from exc


@dataclass(frozen=True, slots=True)
class _FileSelection:
    """The objects that loading the model will read, by their names in the model's folder."""

    files: Mapping[str, ListEntry]

    @classmethod
    def of(cls, bucket: ReadableBucket, prefix: str, options: EngineOptions) -> _FileSelection:
        """Select the files of a folder in a bucket.

        Raises the bucket's errors, ConfigurationError for an empty folder, and ModelFailed if it is no model.
        """
        url, file = options.model, file_name(options.model)
        prefix = prefix[: -len(file) - 1] if file else prefix  # it ends in a slash, which no file does
        listed = bucket.objects(prefix + file, _MAX_OBJECTS + 1)
        entries = [entry for entry in listed if not file or entry.path == prefix + file]
        if not entries:
            raise ConfigurationError(f"there is nothing at {url}; check the bucket's name and the folder's")
        if len(entries) > _MAX_OBJECTS:
            raise ModelFailed(f"{url} contains over {_MAX_OBJECTS:,} objects; use the model's own folder")
        files = _files_by_name(entries, prefix, url)
        if file:
            return cls(files)
        if _INDEX not in files:
            raise ModelFailed(f"{url} is not a model in diffusers' format: it has no {_INDEX}")
        index = _read_index(bucket, files[_INDEX], url)
        return cls({name: files[name] for name in loading.wanted_files(list(files), index, options)})

    @property
    def revision(self) -> str:
        """A hash of names, sizes and the service's checksums: equal files have equal revisions."""
        files = sorted((name, entry.size, entry.checksum) for name, entry in self.files.items())
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:40]


def _files_by_name(entries: Iterable[ListEntry], prefix: str, url: str) -> dict[str, ListEntry]:
    """Return the objects by their names below the prefix; raise ModelFailed for a name no file could have.

    Consoles mark folders by empty objects whose names end in a slash: those are skipped.
    """
    named = {entry.path[len(prefix) :]: entry for entry in entries}
    files = {
        name: entry for name, entry in named.items() if name and not (name[-1] == "/" and not entry.size)
    }
    for name in files:
        has_bad_character = any(char == "\\" or not char.isprintable() for char in name)
        if has_bad_character or any(part.strip() in {"", ".", ".."} for part in name.split("/")):
            raise ModelFailed(
                f"{url} contains {name[:200]!r}, which is not a valid file name in a model's folder; check"
                " who writes there, and remove it"
            )
    return files


def _read_index(bucket: ReadableBucket, entry: ListEntry, url: str) -> dict[str, object]:
    index = None
    try:
        if 0 < entry.size <= _MAX_INDEX_BYTES:
            index = json.loads(bucket.read(entry.path, entry.version, 0, entry.size))
    except ValueError:
        pass
    except PermanentError as exc:
        if exc.status not in _CHANGED_STATUSES:
            raise
        raise ModelFailed(f"{url} could not be fetched: {_describe_read_error(exc)}") from exc
    if not isinstance(index, dict):
        raise ModelFailed(f"{url}/{_INDEX} cannot be read as JSON; upload the model again")
    return index


def _latest_snapshot(snapshots: Snapshots, url: str, exc: TransientError) -> Path:
    latest = snapshots.latest()
    if latest is None:
        raise ModelFailed(f"{url} cannot be read, and this machine has no copy: {exc}") from exc
    log.warning("%s cannot be read (%s); using the latest copy on this machine", url, exc)
    return latest


def _describe_read_error(exc: PermanentError) -> str:
    """Explain why a listed object could not be read."""
    if exc.status in _CHANGED_STATUSES:
        return "it changed during the download; run it again"
    return f"the bucket answers {exc}"


def _describe_list_error(url: str, exc: PermanentError) -> str:
    if exc.status == 404:
        return f"there is no bucket for {url}; check its name"
    if exc.status in {401, 403}:
        return f"this account may not list and read {url} ({exc}); grant that, or check the bucket's name"
    return f"{url} cannot be read: its bucket answers {exc}"


def _digest(options: EngineOptions) -> str:
    """Return a key of the model and of the options that decide which of its files are read."""
    key = (options.model.rstrip("/"), options.variant, options.safety_checker, *options.without)
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:40]
