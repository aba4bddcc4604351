"""Objects of a bucket into a folder: in pieces, several at a time, each file checked as it lies on the disk.

Every piece is asked for by its object's version, so that an object that changes meanwhile is refused by the
service. A file is checked by its size and by the service's sum of it, where it tells one.
"""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Final

from text2img.errors import ModelFailed
from text2img.storage.bucket import Faltered, persist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from text2img.storage.bucket import Listed, Readable

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
        bucket: Readable,
        files: Mapping[str, Listed],
        go_on: Callable[[float], None],
        patience: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bucket, self._files = bucket, files
        self._persist = partial(persist, patience=patience, timeout=0, sleep=go_on, clock=clock)
        self._go_on = go_on

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

    def _fetch(self, file: Path, listed: Listed, start: int) -> None:
        self._go_on(0)
        end = min(start + _PIECE, listed.size)

        def attempt(_: float) -> bytes:
            data = self._bucket.read(listed.path, listed.version, start, end)
            if len(data) != end - start:
                raise Faltered(f"{listed.path} came with {len(data)} bytes instead of {end - start}")
            return data

        data = self._persist(attempt)
        with file.open("r+b") as opened:
            opened.seek(start)
            opened.write(data)

    def _check(self, file: Path, listed: Listed) -> None:
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
