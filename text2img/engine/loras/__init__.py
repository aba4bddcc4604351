"""LoRAs by their paths: allowed, fetched, checked and kept, up to a file on this machine.

Knows nothing of models: whether a file fits one, the engine says. No torch.
"""

from __future__ import annotations

import hashlib
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from text2img.engine.loras.allowlist import Sources
from text2img.engine.loras.header import check_header
from text2img.errors import ErrorCode, PromptFailed, StorageFailed
from text2img.storage.bucket import Faltered

if TYPE_CHECKING:
    from collections.abc import Callable

    from text2img.engine.loras.allowlist import Place
    from text2img.engine.loras.cache import Cache, Note, Sink
    from text2img.prompts.loras import Lora

__all__ = ["Library", "Sources"]

PATIENCE: Final = 30.0
"""Seconds that one LoRA is asked for again while its place cannot be reached; then its prompts wait for their
next attempt."""
_FRESH: Final = 300.0
"""Seconds for which a LoRA that was looked at is not looked at again."""
_REMEMBERED: Final = 1_000
"""So many LoRAs are known to have been looked at; the oldest is forgotten first."""
_PIECE: Final = 2**20


class Library:
    """Gets LoRAs; safe to use from several threads.

    ``cache`` may be None where nothing but local files can be asked for. ``wait(seconds)`` sleeps, and raises
    when the run is to end.
    """

    def __init__(
        self,
        sources: Sources | None = None,
        cache: Cache | None = None,
        wait: Callable[[float], None] = time.sleep,
        *,
        s3_endpoint: str | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self._sources, self._cache, self.wait = sources or Sources(), cache, wait
        self._endpoint, self._patience = s3_endpoint, patience
        self._seen: dict[Lora, tuple[float, str]] = {}
        self._lock = threading.Lock()

    def check(self, lora: Lora) -> None:
        """Raise PromptFailed (``lora_failed``) where it may not be had from there; touches no network."""
        self._sources.check(lora.path)

    def try_cache(self) -> None:
        """Raise ConfigurationError where fetched LoRAs could not be kept."""
        if self._cache is not None:
            self._cache.check()

    def file(self, lora: Lora) -> str:
        """The LoRA's file on this machine: safetensors by its header, of the size and hash that were told.

        Raises PromptFailed: ``lora_failed`` where it will not go better, ``generation_failed`` where its
        place cannot be reached for the moment. Raises what ``wait`` does when the run is to end.
        """
        with self._lock:
            seen, file = self._seen.get(lora, (0.0, ""))
        if file and time.monotonic() < seen + _FRESH and Path(file).is_file():
            return file
        place = self._sources.check(lora.path)
        file = str(_local(place, lora) if place.kind == "file" else self._fetched(place, lora))
        with self._lock:
            self._seen.pop(lora, None)
            self._seen[lora] = time.monotonic(), file
            if len(self._seen) > _REMEMBERED:
                del self._seen[next(iter(self._seen))]
        return file

    def _fetched(self, place: Place, lora: Lora) -> Path:
        """The file in the cache, fetched where it is not there or no longer what its place has."""
        if self._cache is None:
            raise RuntimeError("a library without a cache has sources that want one")
        key = f"{place.kind}://{place.root}/{place.path}{place.query}"
        with self._cache.locked(key):
            note = self._cache.find(key)
            if note is None or lora.sha256 != note.sha256:  # what has the right hash needs no other look
                note = self._patiently(partial(self._fresh, key, place, note, lora))
        try:
            _check_told(lora, note.size, note.sha256)
        except ValueError as exc:
            raise _refused(exc) from None
        return self._cache.path(note)

    def _fresh(self, key: str, place: Place, note: Note | None, lora: Lora) -> Note:
        """What the place has now: what was noted, or what is fetched."""
        assert self._cache is not None  # noqa: S101 - for the type checker; _fetched looked
        known = note.version if note else None

        def check(file: Path, sink: Sink) -> None:
            _check_told(lora, sink.size, sink.sha256)
            check_header(file)

        try:
            new = self._cache.add(key, lambda sink: self._ask(place, known, sink), check)
        except ValueError as exc:
            raise _refused(exc) from None
        except OSError as exc:
            raise Faltered(f"the LoRA cache cannot be written to ({exc.strerror})") from exc
        return new or note or _never()

    def _ask(self, place: Place, known: str | None, sink: Sink) -> str | None:
        if place.kind in {"gs", "s3"}:
            from text2img.engine.loras import bucket

            return bucket.fetch(place, known, sink, self._endpoint)
        if place.kind == "hub":
            from text2img.engine.loras import hub

            return hub.fetch(place, known, sink)
        from text2img.engine.loras import http

        return http.fetch(place, known, sink)

    def _patiently(self, attempt: Callable[[], Note]) -> Note:
        """Try again, with growing waits, while it may go better and there is patience."""
        until, pause = time.monotonic() + self._patience, 0.5
        while True:
            try:
                return attempt()
            except StorageFailed as exc:  # Faltered among them
                if not isinstance(exc, Faltered) or time.monotonic() + pause > until:
                    sentence = f"the LoRA cannot be fetched for the moment: {exc}"
                    raise PromptFailed(ErrorCode.GENERATION_FAILED, sentence) from exc
            self.wait(pause)
            pause = min(2 * pause, 8.0)


def _local(place: Place, lora: Lora) -> Path:
    """The file where it is, checked as one that was fetched."""
    file = Path(*place.parts)
    try:
        check_header(file)
        _check_told(lora, file.stat().st_size, _sha256(file) if lora.sha256 else "")
    except FileNotFoundError:
        raise _refused("there is no such file") from None
    except OSError as exc:
        raise _refused(f"its file cannot be read ({exc.strerror})") from exc
    except ValueError as exc:
        raise _refused(exc) from None
    return file


def _check_told(lora: Lora, size: int, sha256: str) -> None:
    if lora.size is not None and lora.size != size:
        raise ValueError(f"it has {size:,} bytes instead of {lora.size:,}")
    if lora.sha256 is not None and lora.sha256 != sha256:
        raise ValueError("its SHA-256 is not the one that was told")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _refused(why: object) -> PromptFailed:
    return PromptFailed(ErrorCode.LORA_FAILED, f"the LoRA cannot be used: {why}")


def _never() -> Note:
    raise RuntimeError("what was never known cannot be unchanged")
