"""Copies of one model in a folder that processes of one machine share: whole or not there. Knows no network.

A copy is a folder named by its revision; it appears by being renamed and never changes. One process makes it
while others wait. Whoever uses a copy holds a lock on it, and nobody removes it before that is gone.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from text2img.concurrency.file_locks import ALONE, SHARED, locked, try_lock
from text2img.errors import ModelFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

_PART: Final = "part-"
_LOCK: Final = "lock"


class Copies:
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
