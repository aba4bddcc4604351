"""LoRAs that were fetched, in a folder that several runs may share; the least recently used go first.

For each place there is a note (which file, of which version, when last used) and a lock, so that one process
fetches while others wait. Files are named by their content, appear whole or not at all, and never change. A
file that a run is using is locked by it, and no run removes it. Knows no network.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from text2img.concurrency.file_locks import ALONE, SHARED, lock, locked, try_lock
from text2img.engine.loras import ENDING
from text2img.errors import ConfigurationError, ErrorCode, PromptFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HELD: Final = 256
"""Files that a run keeps locked at the most: each is an open file."""
_TORN: Final = 86_400.0  # seconds after which a download that was never finished is removed


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """What is known of a place: its file's name in the folder, size and SHA-256, and its version there."""

    file: str
    size: int
    sha256: str
    version: str


class DownloadWriter:
    """Takes a download in. ``go_on(0)`` is asked before each piece, and raises when the run is to end."""

    def __init__(self, file: BinaryIO, most: int, check_cancelled: Callable[[float], None]) -> None:
        self._file, self._most, self._go_on = file, most, check_cancelled
        self._sum = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        """Take the next piece. Raises PromptFailed (``lora_failed``) where it becomes too much."""
        self._go_on(0)
        self.size += len(data)
        self.expect(self.size)
        self._file.write(data)
        self._sum.update(data)

    def expect(self, size: int | None) -> None:
        """Raise PromptFailed where so many bytes are too many."""
        if size is not None and size > self._most:
            raise PromptFailed(
                ErrorCode.LORA_FAILED,
                f"the LoRA has more than {self._most:,} bytes, which is more than may be fetched",
            )

    @property
    def sha256(self) -> str:
        """Of what was taken in."""
        return self._sum.hexdigest()


class Cache:
    """The folder, of ``size`` bytes at the most; safe from several threads. ``wait(seconds)`` sleeps, and
    raises when the run is to end.
    """

    def __init__(self, folder: Path, size: int, wait: Callable[[float], None]) -> None:
        self._folder, self._size, self._wait = folder, size, wait
        self._held: OrderedDict[str, int] = OrderedDict()  # open descriptors, by file
        weakref.finalize(self, _close, self._held)
        self._holding = threading.Lock()

    def check(self) -> None:
        """Make the folder and see that it can be written to; raises ConfigurationError."""
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
        """Nobody else, in this process or another, fetches for that key within."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(self._folder / f"{_digest(key)}.lock", self._wait):
            yield

    def find(self, key: str) -> CacheEntry | None:
        """What is there for that key, whole; None where nothing is. It counts as used, and stays."""
        note = self._note(key)
        try:
            told = CacheEntry(**json.loads(note.read_text()))
            kept = self._hold(told.file) and (self._folder / told.file).stat().st_size == told.size
        except (OSError, ValueError, TypeError):
            return None
        if kept:
            os.utime(note)
        return told if kept else None

    def path(self, note: CacheEntry) -> Path:
        """Where its file is."""
        return self._folder / note.file

    def add(
        self,
        key: str,
        fetch: Callable[[DownloadWriter], str | None],
        check: Callable[[Path, DownloadWriter], None],
    ) -> CacheEntry | None:
        """Take in what ``fetch`` writes, if ``check`` finds no fault with it, and make room for it.

        ``fetch`` returns the version of what it wrote, None where it wrote nothing: so does this then.
        """
        descriptor, name = tempfile.mkstemp(dir=self._folder, prefix="part-")
        part = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                sink = DownloadWriter(file, self._size, self._wait)
                version = fetch(sink)
                file.flush()
                os.fsync(file.fileno())
            if version is None:
                return None
            check(part, sink)
            told = CacheEntry(f"{sink.sha256}{ENDING}", sink.size, sink.sha256, version)
            if not (self._hold(told.file) and _size(self._folder / told.file) == told.size):
                part.replace(self._folder / told.file)
                self._hold(told.file, anew=True)
        finally:
            part.unlink(missing_ok=True)
        self._write(self._note(key), told)
        self.make_room()
        return told

    def make_room(self) -> None:
        """Remove the least recently used files that nobody uses until the rest fits."""
        notes = sorted(self._folder.glob("*.json"), key=_used)
        named: dict[str, Path] = {}
        for note in notes:  # the latest use of a file that several places have counts
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                named[str(json.loads(note.read_text())["file"])] = note
        for part in self._folder.glob("part-*"):  # of runs that were killed
            if _used(part) < time.time() - _TORN:
                part.unlink(missing_ok=True)
        sizes = {file.name: _size(file) for file in self._folder.glob(f"*{ENDING}")}
        total = sum(sizes.values())
        for name in sorted(sizes, key=lambda name: _used(named[name]) if name in named else 0.0):
            if total <= self._size:
                return
            if name not in self._held and self._remove(name):
                total -= sizes[name]
                if name in named:
                    named[name].unlink(missing_ok=True)

    def _remove(self, name: str) -> bool:
        file = self._folder / name
        with contextlib.suppress(OSError), file.open("rb") as opened:
            if try_lock(opened, ALONE):
                file.unlink()
                return True
        return False

    def _hold(self, name: str, *, anew: bool = False) -> bool:
        """Keep the file from being removed, by any run; False where it is not there. ``anew``: another file
        has taken its place.
        """
        file = self._folder / name
        with self._holding:
            if anew and name in self._held:
                os.close(self._held.pop(name))
            if name not in self._held:
                try:
                    descriptor = os.open(file, os.O_RDONLY)
                except FileNotFoundError:
                    return False
                lock(descriptor, SHARED)  # who removes it holds its lock for a moment alone
                self._held[name] = descriptor
            if not file.exists():
                os.close(self._held.pop(name))
                return False
            self._held.move_to_end(name)
            while len(self._held) > _HELD:
                os.close(self._held.popitem(last=False)[1])
            return True

    def _note(self, key: str) -> Path:
        return self._folder / f"{_digest(key)}.json"

    def _write(self, file: Path, note: CacheEntry) -> None:
        """The note, whole or not at all."""
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(asdict(note)))
        part.replace(file)


def _close(held: dict[str, int]) -> None:
    for descriptor in held.values():
        os.close(descriptor)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:40]


def _used(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
