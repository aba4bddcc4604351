"""A folder of fetched LoRAs that several runs may share, and the threads that fetch ahead of the batches.

Each location has an entry (file, version, time of the last use) and a lock, so that one process fetches while
others wait. Files are named by their hash, are written atomically and never change; the least recently used
are evicted first, beyond the cache's size and when the disk is full. A run locks the files it uses, and no
other run removes a locked file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import queue
import tempfile
import threading
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self, TypeVar

from text2img.concurrency.file_locks import EXCLUSIVE, SHARED, is_full, lock, locked, try_lock
from text2img.engine.loras import SUFFIX, origin_of
from text2img.errors import ConfigurationError, ErrorCode, PromptFailed, Text2ImgError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from io import RawIOBase

    from text2img.engine.loras import LoraCache
    from text2img.prompts import Request
    from text2img.prompts.parameters import Lora


log = logging.getLogger(__name__)

_MAX_LOCKED_FILES: Final = 256
"""Maximum number of files that a run keeps locked: each is an open file descriptor."""
_HEX: Final = "[0-9a-f]"

_Result = TypeVar("_Result")


class CachedFile(str):
    """The path of a file in the cache. While it exists the file is in use, and not evicted by its own run."""

    __slots__ = ("__weakref__",)


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A location's cached file: its name in the folder, size, SHA-256, and version at the location."""

    file: str
    size: int
    sha256: str
    version: str


class DownloadWriter:
    """The file that a download is written to; it must be unbuffered.

    ``check_cancelled(0)`` is called before each chunk, and raises when the run is stopped.
    ``make_room(bytes)`` is called when the disk is full, and returns False if nothing can be done about it.
    """

    def __init__(
        self,
        file: RawIOBase,
        max_bytes: int,
        check_cancelled: Callable[[float], None],
        make_room: Callable[[int], bool],
    ) -> None:
        self._file, self._max_bytes = file, max_bytes
        self._check_cancelled, self._make_room = check_cancelled, make_room
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        """Write the next chunk; raise PromptFailed (``lora_failed``) if the file becomes too large."""
        self._check_cancelled(0)
        self.size += len(data)
        self.check_size(self.size)
        self._hash.update(data)
        left = memoryview(data)
        while left:
            try:
                left = left[self._file.write(left) :]
            except OSError as exc:
                if not (is_full(exc) and self._make_room(len(left))):
                    raise

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
        self._held: defaultdict[str, list[weakref.ref[CachedFile]]] = defaultdict(list)

    def check(self) -> None:
        """Raise ConfigurationError if the folder is not writable; one that is created for this is removed."""
        created = [folder for folder in (self._folder, *self._folder.parents) if not folder.exists()]
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
            with contextlib.suppress(OSError):  # a run may use it by now
                for folder in created:
                    folder.rmdir()
        except OSError as exc:
            raise ConfigurationError(
                f"--lora-cache (LORA_CACHE): {self._folder} cannot be written to ({exc.strerror})"
            ) from exc

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold the key's lock: no other thread or process fetches for it within the block."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = self._folder / f"{_digest(key)}.lock"
        self._with_room(file.touch)
        with locked(file, self._wait):
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
        None too. If the disk is full, what no run uses is evicted, and it is tried again.
        """
        return self._with_room(lambda: self._add(key, fetch, check))

    def _add(
        self,
        key: str,
        fetch: Callable[[DownloadWriter], str | None],
        check: Callable[[Path, DownloadWriter], None],
    ) -> CacheEntry | None:
        descriptor, name = tempfile.mkstemp(dir=self._folder, prefix="part-")
        part = Path(name)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                lock(file, EXCLUSIVE)  # a part that is not locked is left from a run that was killed
                writer = DownloadWriter(file, self._size, self._wait, self._make_room)
                version = fetch(writer)
                os.fsync(file.fileno())
                if version is None:
                    return None
                check(part, writer)
                entry = CacheEntry(f"{writer.sha256}{SUFFIX}", writer.size, writer.sha256, version)
                if not (self._lock_file(entry.file) and _size(self._folder / entry.file) == entry.size):
                    part.replace(self._folder / entry.file)
        finally:
            part.unlink(missing_ok=True)
        self._lock_file(entry.file, replaced=True)
        held = self.hold(self.path(entry))  # while room is made for its entry
        self._with_room(lambda: self._write(self._entry_file(key), entry))
        self.evict()
        del held
        return entry

    def hold(self, file: Path) -> CachedFile:
        """Return the path of a file that this run uses: it is not evicted while the path exists."""
        held = CachedFile(file)
        with self._mutex:
            alive = [each for each in self._held[file.name] if each() is not None]
            self._held[file.name] = [*alive, weakref.ref(held)]
        return held

    def evict(self) -> None:
        """Remove the least recently used files that are not in use, until the rest fits.

        Files of any other name than the cache's own stay: the folder may have the user's LoRAs in it.
        """
        self._remove_parts()
        total = sum(map(_size, self._files()))
        for name, entry_file in self._by_last_use():
            if total <= self._size:
                return
            total -= self._remove(name, entry_file)

    def _with_room(self, action: Callable[[], _Result]) -> _Result:
        """Return what ``action`` returns; if the disk is full, evict something and repeat it."""
        while True:
            try:
                return action()
            except OSError as exc:
                if not (is_full(exc) and self._make_room(1)):
                    raise

    def _make_room(self, needed: int) -> bool:
        """Evict files until ``needed`` bytes are gained; return False if nothing can be evicted."""
        gained = self._remove_parts()
        for name, entry_file in self._by_last_use():
            if gained >= needed:
                break
            gained += self._remove(name, entry_file)
        return gained > 0

    def _by_last_use(self) -> Iterator[tuple[str, Path | None]]:
        """Yield the names of the files, the least recently used first, each with its entry's file."""
        named: dict[str, Path] = {}
        for entry_file in sorted(self._folder.glob(f"{_HEX * 40}.json"), key=_last_used):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                named[str(json.loads(entry_file.read_text())["file"])] = entry_file
        names = {file.name for file in self._files()}
        # For a file of several locations the latest use counts.
        for name in sorted(names, key=lambda name: _last_used(named[name]) if name in named else 0.0):
            yield name, named.get(name)

    def _remove_parts(self) -> int:
        """Remove the parts left by runs that were killed; return how many bytes that gains."""
        return sum(map(self._unlink_unlocked, self._folder.glob(f"part-{'[a-z0-9_]' * 8}")))

    def _files(self) -> Iterator[Path]:
        """Return the cache's own files."""
        return self._folder.glob(f"{_HEX * 64}{SUFFIX}")

    def _remove(self, name: str, entry_file: Path | None) -> int:
        """Remove the file unless it is in use; return how many bytes that gains."""
        with self._mutex:
            if any(held() is not None for held in self._held.get(name, ())):
                return 0
            self._held.pop(name, None)
            if name in self._locked_files:
                os.close(self._locked_files.pop(name))
        gained = self._unlink_unlocked(self._folder / name)
        if gained and entry_file is not None:
            entry_file.unlink(missing_ok=True)
        return gained

    def _unlink_unlocked(self, file: Path) -> int:
        with contextlib.suppress(OSError), file.open("rb") as opened:
            size = _size(file)
            if try_lock(opened, EXCLUSIVE):
                file.unlink()
                return max(size, 1)
        return 0

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
        try:
            part.write_text(json.dumps(asdict(entry)))
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)


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
    Origins = frozenset[str]

_MAX_THREADS: Final = 64
_MAX_ORIGIN_THREADS: Final = 8  # of the same origins: a slow one must not keep the others' files waiting
_POLL_INTERVAL: Final = 0.5  # seconds between checks whether the run is stopped


class LoraPrefetcher:
    """A queue of requests that returns each of them with its LoRAs' files, or with its failure.

    Leaving the ``with`` block does not wait: unfinished downloads are abandoned.
    """

    def __init__(self, cache: LoraCache) -> None:
        self._cache = cache
        self._queued: dict[Origins, deque[Loras]] = {}  # what no thread has begun, by what it comes from
        self._threads: Counter[Origins] = Counter()  # the threads that are at work
        self._results: queue.SimpleQueue[list[Ready] | BaseException] = queue.SimpleQueue()
        self._waiters: dict[Loras, list[Request]] = {}  # requests by the LoRAs they wait for
        self._lock = threading.Lock()
        self.waiting = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._queued.clear()

    def put(self, requests: Iterable[Request]) -> None:
        """Add requests."""
        for request in requests:
            self.waiting += 1
            loras = request.parameters.loras
            if not loras:
                self._results.put([(request, None)])
                continue
            with self._lock:
                waiters = self._waiters.setdefault(loras, [])
                waiters.append(request)
                if len(waiters) == 1:
                    self._enqueue(loras)

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

    def _enqueue(self, loras: Loras) -> None:
        """Add to the queue of the LoRAs' origins, and start a thread for it unless there are enough."""
        origins = frozenset(origin_of(lora.path) for lora in loras)
        self._queued.setdefault(origins, deque()).append(loras)
        if self._threads[origins] < _MAX_ORIGIN_THREADS and self._threads.total() < _MAX_THREADS:
            self._threads[origins] += 1
            threading.Thread(target=self._work, args=(origins,), name="lora", daemon=True).start()

    def _next(self, origins: Origins) -> tuple[Origins, Loras | None]:
        """Return what a thread fetches next: of the same origins, or of those with the fewest threads."""
        with self._lock:
            self._threads[origins] -= 1
            if not self._queued:
                return origins, None
            if origins not in self._queued:
                origins = min(self._queued, key=lambda each: self._threads[each])
            if self._threads[origins] >= _MAX_ORIGIN_THREADS:
                return origins, None
            queued = self._queued[origins]
            loras = queued.popleft()
            if not queued:
                del self._queued[origins]
            self._threads[origins] += 1
            return origins, loras

    def _work(self, origins: Origins) -> None:
        while True:
            origins, loras = self._next(origins)
            if loras is None:
                return
            failed: PromptFailed | None = None
            files: tuple[str, ...] = ()
            try:
                for lora in loras:
                    files = (*files, self._cache.file(lora))
            except PromptFailed as exc:
                prefix = f"lora {len(files) + 1}: " if len(loras) > 1 else ""
                failed = PromptFailed(exc.code, f"{prefix}{exc}")
            except Exception as exc:
                if isinstance(exc, Text2ImgError):  # it concerns the run, not this LoRA
                    self._results.put(exc)
                    continue
                log.debug("fetching a LoRA failed", exc_info=True)
                reason = f"the LoRA cannot be fetched: unexpected {type(exc).__name__}"
                failed = PromptFailed(ErrorCode.LORA_FAILED, reason)
            except BaseException as exc:  # noqa: BLE001 - raised again in take()
                self._results.put(exc)
                continue
            with self._lock:
                waiters = self._waiters.pop(loras)
            self._results.put([(replace(request, lora_files=files), failed) for request in waiters])
            del waiters, files  # the files are in use as long as anything names them
