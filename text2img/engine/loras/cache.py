"""A folder of fetched LoRAs that several runs may share, and the threads that fetch ahead of the batches.

Each location has an entry (file, version, time of the last use) and a lock, so that one process fetches while
others wait. Files are named by their hash, are written atomically and never change; the least recently used
are evicted first. A run locks the files it uses, and no run removes a locked file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Self

from text2img.concurrency.file_locks import EXCLUSIVE, SHARED, lock, locked, try_lock
from text2img.engine.loras import SUFFIX
from text2img.errors import ConfigurationError, ErrorCode, PromptFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from text2img.engine.loras import LoraCache
    from text2img.prompts import Request
    from text2img.prompts.parameters import Lora


_MAX_LOCKED_FILES: Final = 256
"""Maximum number of files that a run keeps locked: each is an open file descriptor."""
_HEX: Final = "[0-9a-f]"
_PARTIAL_FILE_AGE: Final = 86_400.0  # seconds after which an unfinished download is removed


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A location's cached file: its name in the folder, size, SHA-256, and version at the location."""

    file: str
    size: int
    sha256: str
    version: str


class DownloadWriter:
    """The file that a download is written to.

    ``check_cancelled(0)`` is called before each chunk, and raises when the run is stopped.
    """

    def __init__(self, file: BinaryIO, max_bytes: int, check_cancelled: Callable[[float], None]) -> None:
        self._file, self._max_bytes, self._check_cancelled = file, max_bytes, check_cancelled
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        """Write the next chunk; raise PromptFailed (``lora_failed``) if the file becomes too large."""
        self._check_cancelled(0)
        self.size += len(data)
        self.check_size(self.size)
        self._file.write(data)
        self._hash.update(data)

    def check_size(self, size: int | None) -> None:
        """Raise PromptFailed (``lora_failed``) if that many bytes are too many; None is an unknown size."""
        if size is not None and size > self._max_bytes:
            raise PromptFailed(
                ErrorCode.LORA_FAILED,
                f"the LoRA has more than {self._max_bytes:,} bytes, the maximum for a download",
            )

    @property
    def sha256(self) -> str:
        """The SHA-256 of the bytes written so far."""
        return self._hash.hexdigest()


class Cache:
    """The cache folder, of at most ``size`` bytes; thread-safe.

    ``wait(seconds)`` sleeps, and raises when the run is stopped.
    """

    def __init__(self, folder: Path, size: int, wait: Callable[[float], None]) -> None:
        self._folder, self._size, self._wait = folder, size, wait
        self._locked_files: OrderedDict[str, int] = OrderedDict()  # open descriptors, by file
        weakref.finalize(self, _close, self._locked_files)
        self._mutex = threading.Lock()

    def check(self) -> None:
        """Create the folder; raise ConfigurationError if it is not writable."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as exc:
            raise ConfigurationError(
                f"--lora-cache (LORA_CACHE): {self._folder} cannot be written to ({exc.strerror})"
            ) from exc

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold the key's lock: no other thread or process fetches for it within the block."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(self._folder / f"{_digest(key)}.lock", self._wait):
            yield

    def find(self, key: str) -> CacheEntry | None:
        """Return the key's entry if its file is complete, else None; mark it as used and lock its file."""
        entry_file = self._entry_file(key)
        try:
            entry = CacheEntry(**json.loads(entry_file.read_text()))
            is_complete = (
                self._lock_file(entry.file) and (self._folder / entry.file).stat().st_size == entry.size
            )
        except (OSError, ValueError, TypeError):
            return None
        if is_complete:
            os.utime(entry_file)
        return entry if is_complete else None

    def path(self, entry: CacheEntry) -> Path:
        """Return the path of the entry's file."""
        return self._folder / entry.file

    def add(
        self,
        key: str,
        fetch: Callable[[DownloadWriter], str | None],
        check: Callable[[Path, DownloadWriter], None],
    ) -> CacheEntry | None:
        """Add the file that ``fetch`` writes, if ``check`` accepts it, and evict others if necessary.

        ``fetch`` returns the version of what it wrote. If it returns None, it wrote nothing, and this returns
        None too.
        """
        descriptor, name = tempfile.mkstemp(dir=self._folder, prefix="part-")
        part = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                writer = DownloadWriter(file, self._size, self._wait)
                version = fetch(writer)
                file.flush()
                os.fsync(file.fileno())
            if version is None:
                return None
            check(part, writer)
            entry = CacheEntry(f"{writer.sha256}{SUFFIX}", writer.size, writer.sha256, version)
            if not (self._lock_file(entry.file) and _size(self._folder / entry.file) == entry.size):
                part.replace(self._folder / entry.file)
                self._lock_file(entry.file, replaced=True)
        finally:
            part.unlink(missing_ok=True)
        self._write(self._entry_file(key), entry)
        self.evict()
        return entry

    def evict(self) -> None:
        """Remove the least recently used files that no run uses, until the rest fits.

        Files of any other name than the cache's own stay: the folder may have the user's LoRAs in it.
        """
        entry_files = sorted(self._folder.glob(f"{_HEX * 40}.json"), key=_last_used)
        named: dict[str, Path] = {}
        for entry_file in entry_files:  # for a file of several locations the latest use counts
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                named[str(json.loads(entry_file.read_text())["file"])] = entry_file
        for part in self._folder.glob(f"part-{'[a-z0-9_]' * 8}"):  # left by runs that were killed
            if _last_used(part) < time.time() - _PARTIAL_FILE_AGE:
                part.unlink(missing_ok=True)
        sizes = {file.name: _size(file) for file in self._folder.glob(f"{_HEX * 64}{SUFFIX}")}
        total = sum(sizes.values())
        for name in sorted(sizes, key=lambda name: _last_used(named[name]) if name in named else 0.0):
            if total <= self._size:
                return
            if name not in self._locked_files and self._remove(name):
                total -= sizes[name]
                if name in named:
                    named[name].unlink(missing_ok=True)

    def _remove(self, name: str) -> bool:
        file = self._folder / name
        with contextlib.suppress(OSError), file.open("rb") as opened:
            if try_lock(opened, EXCLUSIVE):
                file.unlink()
                return True
        return False

    def _lock_file(self, name: str, *, replaced: bool = False) -> bool:
        """Lock the file, so that no run removes it; return False if it is missing.

        ``replaced`` is True if a new file has replaced the one that was locked before.
        """
        file = self._folder / name
        with self._mutex:
            if replaced and name in self._locked_files:
                os.close(self._locked_files.pop(name))
            if name not in self._locked_files:
                try:
                    descriptor = os.open(file, os.O_RDONLY)
                except FileNotFoundError:
                    return False
                lock(descriptor, SHARED)  # waits while another process removes the file
                self._locked_files[name] = descriptor
            if not file.exists():
                os.close(self._locked_files.pop(name))
                return False
            self._locked_files.move_to_end(name)
            while len(self._locked_files) > _MAX_LOCKED_FILES:
                os.close(self._locked_files.popitem(last=False)[1])
            return True

    def _entry_file(self, key: str) -> Path:
        return self._folder / f"{_digest(key)}.json"

    def _write(self, file: Path, entry: CacheEntry) -> None:
        """Write the entry atomically."""
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(asdict(entry)))
        part.replace(file)


def _close(locked_files: dict[str, int]) -> None:
    for descriptor in locked_files.values():
        os.close(descriptor)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:40]


def _last_used(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


if TYPE_CHECKING:
    Loras = tuple[Lora, ...]
    Ready = tuple[Request, PromptFailed | None]

_THREADS: Final = 8
_POLL_INTERVAL: Final = 0.5  # seconds between checks whether the run is stopped


class LoraPrefetcher:
    """A queue of requests that returns each of them with its LoRAs' files, or with its failure.

    Leaving the ``with`` block does not wait: unfinished downloads are abandoned.
    """

    def __init__(self, cache: LoraCache) -> None:
        self._cache = cache
        self._queued: queue.SimpleQueue[Loras | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[list[Ready] | BaseException] = queue.SimpleQueue()
        self._waiters: dict[Loras, list[Request]] = {}  # requests by the LoRAs they wait for
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.waiting = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for _ in self._threads:
            self._queued.put(None)

    def put(self, requests: Iterable[Request]) -> None:
        """Add requests."""
        for request in requests:
            self.waiting += 1
            loras = request.parameters.loras
            if not loras:
                self._results.put([(request, None)])
                continue
            self._start()
            with self._lock:
                waiters = self._waiters.setdefault(loras, [])
                waiters.append(request)
                if len(waiters) == 1:
                    self._queued.put(loras)

    def take(self, *, max_pending: int) -> list[Ready]:
        """Return the ready requests; wait until at most ``max_pending`` are still pending.

        Raises an error of a fetch that is not a prompt's failure, and what the cache's ``wait`` raises.
        """
        taken: list[Ready] = []
        while self.waiting:
            try:
                done = self._results.get(timeout=_POLL_INTERVAL if self.waiting > max_pending else 0)
            except queue.Empty:
                self._cache.wait(0)
                if self.waiting > max_pending:
                    continue
                break
            if isinstance(done, BaseException):
                raise done
            self.waiting -= len(done)
            taken += done
        return taken

    def _start(self) -> None:
        """Start the threads at the first request with a LoRA."""
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._work, name=f"lora-{number}", daemon=True)
                for number in range(_THREADS)
            ]
            for thread in self._threads:
                thread.start()

    def _work(self) -> None:
        while loras := self._queued.get():
            failed: PromptFailed | None = None
            files: tuple[str, ...] = ()
            try:
                for lora in loras:
                    files = (*files, self._cache.file(lora))
            except PromptFailed as exc:
                prefix = f"lora {len(files) + 1}: " if len(loras) > 1 else ""
                failed = PromptFailed(exc.code, f"{prefix}{exc}")
            except BaseException as exc:  # noqa: BLE001 - raised again in take()
                self._results.put(exc)
                continue
            with self._lock:
                waiters = self._waiters.pop(loras)
            self._results.put([(replace(request, lora_files=files), failed) for request in waiters])
