"""LoRAs by their paths: allowed, fetched, checked and kept, up to a file on this machine.

Knows nothing of models: whether a file fits one, the engine says. No torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import threading
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

from text2img.errors import ConfigurationError, ErrorCode, PromptFailed, StorageFailed
from text2img.storage.bucket import TransientError

if TYPE_CHECKING:
    from collections.abc import Callable

    from text2img.engine.loras.cache import Cache, CacheEntry, DownloadWriter
    from text2img.prompts.parameters import Lora


__all__ = ["Library", "Sources"]

PATIENCE: Final = 30.0
"""Seconds that one LoRA is asked for again while its place cannot be reached; then its prompts wait for their
next attempt."""
_FRESH: Final = 300.0
"""Seconds for which a LoRA that was looked at is not looked at again."""
_REMEMBERED: Final = 1_000
"""So many LoRAs are known to have been looked at; the oldest is forgotten first."""
_PIECE: Final = 2**20


class LoraCache:
    """Gets LoRAs; safe to use from several threads.

    ``cache`` may be None where nothing but local files can be asked for. ``wait(seconds)`` sleeps, and raises
    when the run is to end.
    """

    def __init__(
        self,
        sources: SourceAllowlist | None = None,
        cache: Cache | None = None,
        wait: Callable[[float], None] = time.sleep,
        *,
        s3_endpoint: str | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self._sources, self._cache, self.wait = sources or SourceAllowlist(), cache, wait
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

    def _fetched(self, place: LoraLocation, lora: Lora) -> Path:
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

    def _fresh(self, key: str, place: LoraLocation, note: CacheEntry | None, lora: Lora) -> CacheEntry:
        """What the place has now: what was noted, or what is fetched."""
        assert self._cache is not None  # noqa: S101 - for the type checker; _fetched looked
        known = note.version if note else None

        def check(file: Path, sink: DownloadWriter) -> None:
            _check_told(lora, sink.size, sink.sha256)
            check_header(file)

        try:
            new = self._cache.add(key, lambda sink: self._ask(place, known, sink), check)
        except ValueError as exc:
            raise _refused(exc) from None
        except OSError as exc:
            raise TransientError(f"the LoRA cache cannot be written to ({exc.strerror})") from exc
        return new or note or _never()

    def _ask(self, place: LoraLocation, known: str | None, sink: DownloadWriter) -> str | None:
        from text2img.engine.loras.sources import fetch_from_bucket, fetch_from_hub, fetch_from_web

        if place.kind in {"gs", "s3"}:
            return fetch_from_bucket(place, known, sink, self._endpoint)
        fetch = fetch_from_hub if place.kind == "hub" else fetch_from_web
        return fetch(place, known, sink)

    def _patiently(self, attempt: Callable[[], CacheEntry]) -> CacheEntry:
        """Try again, with growing waits, while it may go better and there is patience."""
        until, pause = time.monotonic() + self._patience, 0.5
        while True:
            try:
                return attempt()
            except StorageFailed as exc:  # Faltered among them
                if not isinstance(exc, TransientError) or time.monotonic() + pause > until:
                    message = f"the LoRA cannot be fetched for the moment: {exc}"
                    raise PromptFailed(ErrorCode.GENERATION_FAILED, message) from exc
            self.wait(pause)
            pause = min(2 * pause, 8.0)


def _local(place: LoraLocation, lora: Lora) -> Path:
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


def _never() -> CacheEntry:
    raise RuntimeError("what was never known cannot be unchanged")


_LONGEST: Final = 100_000_000
"""Bytes of a header; the library's own bound."""


def check_header(file: Path) -> None:
    """Raise ValueError with a reason where the file is no whole safetensors file."""
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_LONGEST, size - 8):
            raise ValueError(f"it is no safetensors file, but {_looks_like(start)}")
        header = _json(opened.read(length))
    spans = sorted(_span(name, told) for name, told in header.items() if name != "__metadata__")
    ends = [(0, 0), *spans, (size - 8 - length, size - 8 - length)]
    if any(first[1] != second[0] for first, second in pairwise(ends)):
        raise ValueError("it is torn: its tensors do not fill the file")


def _json(header: bytes) -> dict[str, object]:
    try:
        told = json.loads(header)
    except (ValueError, RecursionError):
        raise ValueError("it is no safetensors file: its header is not JSON") from None
    if not isinstance(told, dict) or len(told.keys() - {"__metadata__"}) == 0:
        raise ValueError("it holds no tensors")
    return told


def _span(name: str, told: object) -> tuple[int, int]:
    """Where a tensor begins and ends, behind the header."""
    offsets = told.get("data_offsets") if isinstance(told, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(each) is int for each in offsets):
        raise ValueError(f"its header does not say where {name[:60]!r} is")
    if not 0 <= offsets[0] <= offsets[1]:
        raise ValueError(f"its header misplaces {name[:60]!r}")
    return offsets[0], offsets[1]


def _looks_like(start: bytes) -> str:
    if start[:1] == b"<":
        return "a web page"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "a pickle, which could run code and is never opened"
    return "something else, or too short"


ENDING: Final = ".safetensors"
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB_FILE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+()-]{0,199}")
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_HOST: Final = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:]+\]")
_ODD: Final = re.compile(r"[\x00-\x20\x7f\\]|[^\x00-\x7f]")
"""What no URL holds as it stands: controls, blanks, backslashes (slashes to some), other scripts."""
_LOOPBACK: Final = ("127.0.0.1", "localhost", "[::1]")
_PORTS: Final = {"https": 443, "http": 80}


class _UnreadableError(ValueError):
    """A path that means nothing, or could mean two things; says why."""


@dataclass(frozen=True, slots=True)
class LoraLocation:
    """Where a LoRA is, or a prefix of such. ``kind``: file, hub, gs, s3, https or http; ``root``: the bucket,
    or ``host:port``; ``parts``: what stands between slashes; ``query`` of a URL, with its question mark.
    """

    kind: str
    root: str
    parts: tuple[str, ...]
    query: str = ""

    def holds(self, other: LoraLocation) -> bool:
        """Whether the other is this one or lies below it."""
        below = other.parts[: len(self.parts)] == self.parts
        return (self.kind, self.root) == (other.kind, other.root) and below

    @property
    def path(self) -> str:
        """The parts, with slashes between."""
        return "/".join(self.parts)


class SourceAllowlist:
    """The prefixes that the operator allows; none, and no LoRA is fetched."""

    def __init__(self, allowed: tuple[LoraLocation, ...] = ()) -> None:
        self._allowed = allowed

    @classmethod
    def parse(cls, text: str | None) -> SourceAllowlist:
        """Of prefixes with commas between: folders, ``hub:``, ``hub:owner/``, ``gs://…``, ``s3://…``,
        ``https://…``, and ``http://`` on loopback. Raises ConfigurationError for what is none of them.
        """
        prefixes = [part.strip() for part in (text or "").split(",") if part.strip()]
        try:
            return cls(tuple(_prefix(each) for each in prefixes))
        except _UnreadableError as exc:
            raise ConfigurationError(f"--lora-source (LORA_SOURCE): {exc}") from None

    def __bool__(self) -> bool:
        return bool(self._allowed)

    def check(self, path: str) -> LoraLocation:
        """Where the path leads. Raises PromptFailed (``lora_failed``) where that is not allowed."""
        try:
            place = _place(path)
        except _UnreadableError as exc:
            raise PromptFailed(ErrorCode.LORA_FAILED, f"the path of the LoRA cannot be used: {exc}") from None
        if place.kind == "file":
            place = _resolved(place)
        if not any(allowed.holds(place) for allowed in self._allowed):
            raise PromptFailed(
                ErrorCode.LORA_FAILED,
                "this LoRA is not from a source that the operator of this job allows; sources are allowed by"
                " --lora-source (LORA_SOURCE)",
            )
        return place


def _prefix(text: str) -> LoraLocation:
    """What the operator writes: as documents do, but for folders of any spelling, and ``hub:``."""
    if text.startswith("hub:"):
        parts = tuple(text.removeprefix("hub:").strip("/").split("/"))
        parts = () if parts == ("",) else parts
        if len(parts) > 2 or not all(_HUB_NAME.fullmatch(part) for part in parts):
            raise _UnreadableError(f"{text} should be hub:, hub:OWNER/ or hub:OWNER/NAME")
        return LoraLocation("hub", "", parts)
    if "://" in text:
        return _url(text, prefix=True)
    if not text.startswith(("/", ".", "~")):
        raise _UnreadableError(f"{text} should be a folder (/… or ./…), hub:…, gs://…, s3://… or https://…")
    return LoraLocation("file", "", Path(text).expanduser().resolve().parts)


def _place(path: str) -> LoraLocation:
    if "://" in path:
        return _url(path, prefix=False)
    if path.startswith("/"):
        if not path.endswith(ENDING):
            raise _UnreadableError(f"a file's name must end in {ENDING}")
        return LoraLocation("file", "", Path(path).parts)
    owner_name, files = path.split("/")[:2], path.split("/")[2:]
    named = len(owner_name) == 2 and all(_HUB_NAME.fullmatch(part) for part in owner_name)
    if not named or not all(_HUB_FILE.fullmatch(part) for part in files):
        raise _UnreadableError("write /FOLDER/FILE, OWNER/NAME of the hub, gs://…, s3://… or https://…")
    if files and not files[-1].endswith(ENDING):
        raise _UnreadableError(f"a file's name must end in {ENDING}")
    return LoraLocation("hub", "", (*owner_name, *files))


def _url(text: str, *, prefix: bool) -> LoraLocation:
    if _ODD.search(text):
        raise _UnreadableError("a URL must not hold blanks, backslashes, or characters that are not ASCII")
    scheme, _, rest = text.partition("://")
    kind = scheme.lower()
    if kind in {"gs", "s3"}:
        bucket, _, key = rest.partition("/")
        if not _BUCKET.fullmatch(bucket) or re.search(r"[?#]", key):
            raise _UnreadableError(f"write {kind}://BUCKET/KEY")
        return LoraLocation(kind, bucket, _parts(key, prefix=prefix))
    if kind not in _PORTS:
        raise _UnreadableError(f"{kind[:20]}:// is not read; use gs://, s3:// or https://")
    return _web(text, kind, prefix=prefix)


def _web(text: str, kind: str, *, prefix: bool) -> LoraLocation:
    try:
        split = urlsplit(text)
        host, port = split.netloc.lower(), split.port or _PORTS[kind]
    except ValueError:
        raise _UnreadableError("it is no URL") from None
    if "@" in host:
        raise _UnreadableError("a URL must not hold a user or a password")
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
    if not _HOST.fullmatch(name) or ".." in name or split.fragment:
        raise _UnreadableError(f"write {kind}://HOST/PATH")
    if kind == "http" and name not in _LOOPBACK:
        raise _UnreadableError("http:// is not read but on this machine itself; use https://")
    query = f"?{split.query}" if split.query else ""
    if prefix and query:
        raise _UnreadableError("a source is a prefix, without a question mark")
    return LoraLocation(kind, f"{name}:{port}", _parts(split.path.removeprefix("/"), prefix=prefix), query)


def _parts(path: str, *, prefix: bool) -> tuple[str, ...]:
    """What stands between the slashes, as it is written; nothing that a server could take for another."""
    parts = tuple(path.split("/"))
    if prefix and parts[-1] == "":  # the slash that ends a prefix, or no path at all
        parts = parts[:-1]
    for part in parts:
        plain = _unquoted(part)
        if plain.strip() in {"", ".", ".."} or re.search(r"[/\\\x00-\x1f\x7f]", plain):
            raise _UnreadableError("its path has an empty part, dots alone, or a hidden slash")
    return parts


def _unquoted(part: str) -> str:
    """The part with its percent signs read, however often they were written over one another."""
    while (plain := unquote(part)) != part:
        part = plain
    return part


def _resolved(place: LoraLocation) -> LoraLocation:
    """Where the file is once all symbolic links are followed."""
    try:
        return LoraLocation("file", "", Path(*place.parts).resolve().parts)
    except (OSError, RuntimeError, ValueError):
        raise PromptFailed(ErrorCode.LORA_FAILED, "the path of the LoRA cannot be followed") from None
