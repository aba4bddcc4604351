"""LoRAs by path: check that the source is allowed, fetch, validate and cache the file.

This package imports no torch and is independent of models: the engine checks whether a file fits one.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

from tenacity import (
    Retrying,
    retry_if_exception_type,
    retry_if_not_exception_type,
    stop_before_delay,
    wait_exponential,
)

from text2img.errors import ConfigurationError, ErrorCode, PromptFailed, StorageFailed
from text2img.settings import expand_home
from text2img.storage.bucket import TransientError

if TYPE_CHECKING:
    from collections.abc import Callable

    from text2img.engine.loras.cache import Cache, CacheEntry, DownloadWriter
    from text2img.prompts.parameters import Lora


__all__ = [
    "SUFFIX",
    "LoraCache",
    "LoraLocation",
    "SourceAllowlist",
    "origin_of",
]

RETRY_TIMEOUT: Final = 30.0
"""Seconds for which one LoRA is retried while its source is unavailable; then its prompts wait for their next
attempt."""
_RECHECK_INTERVAL: Final = 300.0
"""Seconds for which a LoRA's source is not queried again."""
_MAX_CHECKED: Final = 1_000
"""Maximum number of LoRAs whose last check is remembered; the oldest is dropped first."""


SLOW_ORIGIN_WAITS: Final = (60.0, 600.0)
"""Seconds for which an origin that was too slow is not asked again: at first, and at most, doubling."""


class SourceTooSlow(TransientError):  # noqa: N818 - as its base class
    """A source sends too little, or nothing, for too long."""


class SlowOrigins:
    """The origins (a web server, a bucket, the hub) that are not asked for a while; thread-safe.

    What is too slow occupies a thread until it is given up. So an origin is left alone after that, for a time
    that doubles while it stays slow; others are not affected.
    """

    def __init__(self) -> None:
        self._waits: dict[str, tuple[float, float]] = {}  # until when, and for how long, by origin
        self._lock = threading.Lock()

    def check(self, origin: str) -> None:
        """Raise SourceTooSlow if the origin is to be left alone now."""
        with self._lock:
            until, _ = self._waits.get(origin, (0.0, 0.0))
        left = until - time.monotonic()
        if left > 0:
            raise SourceTooSlow(f"its server was too slow, and is not asked again for {left:.0f} s")

    def failed(self, origin: str) -> None:
        """Note that the origin was too slow."""
        with self._lock:
            until, wait = self._waits.get(origin, (0.0, 0.0))
            if time.monotonic() < until:  # several requests at once count as one
                return
            wait = min(max(SLOW_ORIGIN_WAITS[0], 2 * wait), SLOW_ORIGIN_WAITS[1])
            self._waits[origin] = time.monotonic() + wait, wait

    def succeeded(self, origin: str) -> None:
        """Note that the origin has sent a file."""
        with self._lock:
            self._waits.pop(origin, None)


class LoraCache:
    """Provides the files of LoRAs; thread-safe.

    ``cache`` may be None if only local files are allowed. ``wait(seconds)`` sleeps, and raises when the run
    is stopped.
    """

    def __init__(
        self,
        sources: SourceAllowlist | None = None,
        cache: Cache | None = None,
        wait: Callable[[float], None] = time.sleep,
        *,
        s3_endpoint: str | None = None,
        retry_timeout: float = RETRY_TIMEOUT,
    ) -> None:
        self._sources, self._cache, self.wait = sources or SourceAllowlist(), cache, wait
        self._endpoint, self._retry_timeout = s3_endpoint, retry_timeout
        self._checked: dict[Lora, tuple[float, str]] = {}
        self._slow_origins = SlowOrigins()
        self._lock = threading.Lock()

    def check(self, lora: Lora) -> None:
        """Raise PromptFailed (``lora_failed``) if the LoRA's source is not allowed; makes no request."""
        self._sources.check(lora.path)

    def check_cache(self) -> None:
        """Raise ConfigurationError if the cache folder is not writable."""
        if self._cache is not None:
            self._cache.check()

    def file(self, lora: Lora) -> str:
        """Return the LoRA's file on this machine: valid safetensors, with the declared size and hash.

        Raises PromptFailed: ``lora_failed`` for a permanent error, ``generation_failed`` while the source is
        unavailable. Raises what ``wait`` raises when the run is stopped.
        """
        with self._lock:
            checked_at, file = self._checked.get(lora, (0.0, ""))
        if file and time.monotonic() < checked_at + _RECHECK_INTERVAL:
            held = self._cache.hold(Path(file)) if self._cache is not None else file
            if Path(held).is_file():
                return held
        location = self._sources.check(lora.path)
        file = str(_local_file(location, lora)) if location.kind == "file" else self._fetch(location, lora)
        with self._lock:
            self._checked.pop(lora, None)
            self._checked[lora] = time.monotonic(), str(file)
            if len(self._checked) > _MAX_CHECKED:
                del self._checked[next(iter(self._checked))]
        return file

    def _fetch(self, location: LoraLocation, lora: Lora) -> str:
        """Return the cached file, fetched if it is missing or the source has another version."""
        if self._cache is None:
            raise RuntimeError("these LoRA sources need a cache")
        key = f"{location.kind}://{location.root}/{location.path}{location.query}"
        try:
            with self._cache.locked(key):
                entry = self._cache.find(key)
                held = self._cache.hold(self._cache.path(entry)) if entry else ""
                if entry is None or lora.sha256 != entry.sha256:  # a file with the right hash needs no query
                    entry = self._with_retries(partial(self._revalidate, key, location, entry, lora))
                file = self._cache.hold(self._cache.path(entry))
                del held
        except OSError as exc:
            message = f"the LoRA cache cannot be used ({exc.strerror or type(exc).__name__})"
            raise PromptFailed(ErrorCode.GENERATION_FAILED, message) from exc
        try:
            _check_expected(lora, entry.size, entry.sha256)
        except ValueError as exc:
            raise _unusable(exc) from None
        return file

    def _revalidate(
        self, key: str, location: LoraLocation, entry: CacheEntry | None, lora: Lora
    ) -> CacheEntry:
        """Return the entry of the source's current version: the cached one if unchanged, else a new one."""
        from text2img.engine.loras.sources import check_header

        assert self._cache is not None  # noqa: S101 - for the type checker; _fetch has checked it
        known_version = entry.version if entry else None

        def check(file: Path, writer: DownloadWriter) -> None:
            _check_expected(lora, writer.size, writer.sha256)
            check_header(file)

        try:
            new = self._cache.add(
                key, lambda writer: self._fetch_from_source(location, known_version, writer), check
            )
        except ValueError as exc:
            raise _unusable(exc) from None
        except OSError as exc:
            raise TransientError(f"the LoRA cache cannot be written to ({exc.strerror})") from exc
        current = new or entry
        if current is None:
            raise RuntimeError("the source reported an unknown version as unchanged")
        return current

    def _fetch_from_source(
        self, location: LoraLocation, known_version: str | None, writer: DownloadWriter
    ) -> str | None:
        origin = location.origin
        self._slow_origins.check(origin)
        try:
            version = self._fetch_once(location, known_version, writer)
        except SourceTooSlow:
            self._slow_origins.failed(origin)
            raise
        self._slow_origins.succeeded(origin)
        return version

    def _fetch_once(
        self, location: LoraLocation, known_version: str | None, writer: DownloadWriter
    ) -> str | None:
        from text2img.engine.loras.sources import (
            fetch_from_bucket,
            fetch_from_hub,
            fetch_from_web,
            refuse_peft_file,
        )

        refuse_peft_file(location.path)
        if location.kind in {"gs", "s3"}:
            return fetch_from_bucket(location, known_version, writer, self._endpoint)
        fetch = fetch_from_hub if location.kind == "hub" else fetch_from_web
        return fetch(location, known_version, writer)

    def _with_retries(self, attempt: Callable[[], CacheEntry]) -> CacheEntry:
        """Retry transient errors with backoff until the retry timeout; raise PromptFailed after it.

        A source that is too slow has had its time already.
        """
        retrying = Retrying(
            retry=retry_if_exception_type(TransientError) & retry_if_not_exception_type(SourceTooSlow),
            wait=wait_exponential(multiplier=0.5, max=8),
            stop=stop_before_delay(self._retry_timeout),
            sleep=self.wait,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except StorageFailed as exc:  # includes TransientError
            message = f"the LoRA cannot be fetched for the moment: {exc}"
            raise PromptFailed(ErrorCode.GENERATION_FAILED, message) from exc


def _local_file(location: LoraLocation, lora: Lora) -> Path:
    """Return the local file in place, validated like a fetched one."""
    from text2img.engine.loras.sources import check_header

    file = Path(*location.parts)
    try:
        check_header(file)
        _check_expected(lora, file.stat().st_size, _sha256(file) if lora.sha256 else "")
    except FileNotFoundError:
        raise _unusable("there is no such file") from None
    except OSError as exc:
        raise _unusable(f"its file cannot be read ({exc.strerror})") from exc
    except ValueError as exc:
        raise _unusable(exc) from None
    return file


def _check_expected(lora: Lora, size: int, sha256: str) -> None:
    if lora.size is not None and lora.size != size:
        raise ValueError(f"it has {size:,} bytes instead of {lora.size:,}")
    if lora.sha256 is not None and lora.sha256 != sha256:
        raise ValueError("its SHA-256 is not the requested one")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _unusable(reason: object) -> PromptFailed:
    return PromptFailed(ErrorCode.LORA_FAILED, f"the LoRA cannot be used: {reason}")


SUFFIX: Final = ".safetensors"
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB_FILE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+()-]{0,199}")
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_HOST: Final = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:]+\]")
_FORBIDDEN_IN_URL: Final = re.compile(r"[\x00-\x20\x7f\\]|[^\x00-\x7f]")
"""Characters that a valid URL must escape: control characters, blanks, backslashes (which some clients treat
as slashes) and non-ASCII characters."""
_LOOPBACK: Final = ("127.0.0.1", "localhost", "[::1]")
_PORTS: Final = {"https": 443, "http": 80}


class _InvalidPathError(ValueError):
    """A path that is invalid or ambiguous; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class LoraLocation:
    """The location of a LoRA, or a prefix of locations.

    ``kind`` is file, hub, gs, s3, https or http; ``root`` is the bucket or ``host:port``; ``parts`` are the
    path's segments; ``query`` is a URL's query, with its question mark.
    """

    kind: str
    root: str
    parts: tuple[str, ...]
    query: str = ""

    def contains(self, other: LoraLocation) -> bool:
        """Return True if the other location is this one or below it."""
        shares_path = other.parts[: len(self.parts)] == self.parts
        return (self.kind, self.root) == (other.kind, other.root) and shares_path

    @property
    def path(self) -> str:
        """The path: the segments joined by slashes."""
        return "/".join(self.parts)

    @property
    def origin(self) -> str:
        """The server or bucket of the file, such as ``https://host:443``; empty for a local file."""
        return "" if self.kind == "file" else f"{self.kind}://{self.root}"


def origin_of(path: str) -> str:
    """Return the origin of a LoRA's path; empty for a local file and for an invalid path."""
    try:
        return _parse_path(path).origin
    except _InvalidPathError:
        return ""


class SourceAllowlist:
    """The location prefixes that the operator allows; with none, no LoRA is allowed."""

    def __init__(self, allowed: tuple[LoraLocation, ...] = ()) -> None:
        self._allowed = allowed

    @classmethod
    def parse(cls, text: str | None) -> SourceAllowlist:
        """Parse comma-separated prefixes.

        A prefix is a folder, ``hub:``, ``hub:owner/``, ``gs://…``, ``s3://…``, ``https://…``, or ``http://``
        on loopback. Raises ConfigurationError for anything else.
        """
        prefixes = [part.strip() for part in (text or "").split(",") if part.strip()]
        try:
            return cls(tuple(_parse_prefix(prefix) for prefix in prefixes))
        except _InvalidPathError as exc:
            raise ConfigurationError(f"--lora-source (LORA_SOURCE): {exc}") from None

    def __bool__(self) -> bool:
        return bool(self._allowed)

    @property
    def needs_cache(self) -> bool:
        """True if some of the sources are not folders of this machine."""
        return any(location.kind != "file" for location in self._allowed)

    def check(self, path: str) -> LoraLocation:
        """Return the path's location; raise PromptFailed (``lora_failed``) unless it is allowed."""
        try:
            location = _parse_path(path)
        except _InvalidPathError as exc:
            raise PromptFailed(ErrorCode.LORA_FAILED, f"the path of the LoRA cannot be used: {exc}") from None
        if location.kind == "file":
            location = _resolved(location)
        if not any(allowed.contains(location) for allowed in self._allowed):
            raise PromptFailed(
                ErrorCode.LORA_FAILED,
                "this LoRA is not from a source that the operator of this job allows; sources are allowed by"
                " --lora-source (LORA_SOURCE)",
            )
        return location


def _parse_prefix(text: str) -> LoraLocation:
    """Parse a prefix from the operator: like a document's path, but with ``hub:`` and any form of folder."""
    if text.startswith("hub:"):
        parts = tuple(text.removeprefix("hub:").strip("/").split("/"))
        parts = () if parts == ("",) else parts
        if len(parts) > 2 or not all(_HUB_NAME.fullmatch(part) for part in parts):
            raise _InvalidPathError(f"{text} should be hub:, hub:OWNER/ or hub:OWNER/NAME")
        return LoraLocation("hub", "", parts)
    if "://" in text:
        return _parse_url(text, prefix=True)
    if not text.startswith(("/", ".", "~")):
        raise _InvalidPathError(f"{text} should be a folder (/… or ./…), hub:…, gs://…, s3://… or https://…")
    return LoraLocation("file", "", expand_home(text, "--lora-source (LORA_SOURCE)").resolve().parts)


def _parse_path(path: str) -> LoraLocation:
    if "://" in path:
        return _parse_url(path, prefix=False)
    if path.startswith("/"):
        if not path.endswith(SUFFIX):
            raise _InvalidPathError(f"a file's name must end in {SUFFIX}")
        return LoraLocation("file", "", Path(path).parts)
    owner_name, files = path.split("/")[:2], path.split("/")[2:]
    named = len(owner_name) == 2 and all(_HUB_NAME.fullmatch(part) for part in owner_name)
    if not named or not all(_HUB_FILE.fullmatch(part) for part in files):
        raise _InvalidPathError("write /FOLDER/FILE, OWNER/NAME of the hub, gs://…, s3://… or https://…")
    if files and not files[-1].endswith(SUFFIX):
        raise _InvalidPathError(f"a file's name must end in {SUFFIX}")
    return LoraLocation("hub", "", (*owner_name, *files))


def _parse_url(text: str, *, prefix: bool) -> LoraLocation:
    if _FORBIDDEN_IN_URL.search(text):
        raise _InvalidPathError("a URL must not contain blanks, backslashes or non-ASCII characters")
    scheme, _, rest = text.partition("://")
    kind = scheme.lower()
    if kind in {"gs", "s3"}:
        bucket, _, key = rest.partition("/")
        if not _BUCKET.fullmatch(bucket) or re.search(r"[?#]", key):
            raise _InvalidPathError(f"write {kind}://BUCKET/KEY")
        return LoraLocation(kind, bucket, _split_path(key, prefix=prefix))
    if kind not in _PORTS:
        raise _InvalidPathError(f"{kind[:20]}:// is not supported; use gs://, s3:// or https://")
    return _parse_web_url(text, kind, prefix=prefix)


def _parse_web_url(text: str, kind: str, *, prefix: bool) -> LoraLocation:
    try:
        split = urlsplit(text)
        host, port = split.netloc.lower(), split.port or _PORTS[kind]
    except ValueError:
        raise _InvalidPathError("it is not a valid URL") from None
    if "@" in host:
        raise _InvalidPathError("a URL must not contain a user or a password")
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
    if not _HOST.fullmatch(name) or ".." in name or split.fragment:
        raise _InvalidPathError(f"write {kind}://HOST/PATH")
    if kind == "http" and name not in _LOOPBACK:
        raise _InvalidPathError("http:// is supported only on this machine itself; use https://")
    query = f"?{split.query}" if split.query else ""
    if prefix and query:
        raise _InvalidPathError("a source is a prefix and must not contain a question mark")
    return LoraLocation(
        kind, f"{name}:{port}", _split_path(split.path.removeprefix("/"), prefix=prefix), query
    )


def _split_path(path: str, *, prefix: bool) -> tuple[str, ...]:
    """Return the path's segments unchanged; reject those that a server could interpret as another path."""
    parts = tuple(path.split("/"))
    if prefix and parts[-1] == "":  # a trailing slash, or no path at all
        parts = parts[:-1]
    for part in parts:
        plain = _fully_unquoted(part)
        if plain.strip() in {"", ".", ".."} or re.search(r"[/\\\x00-\x1f\x7f]", plain):
            raise _InvalidPathError("its path has a segment that is empty, only dots, or hides a slash")
    return parts


def _fully_unquoted(part: str) -> str:
    """Return the segment percent-decoded until it no longer changes: it may be encoded repeatedly."""
    while (plain := unquote(part)) != part:
        part = plain
    return part


def _resolved(location: LoraLocation) -> LoraLocation:
    """Return the file's location with all symbolic links resolved."""
    try:
        return LoraLocation("file", "", Path(*location.parts).resolve().parts)
    except (OSError, RuntimeError, ValueError):
        raise PromptFailed(ErrorCode.LORA_FAILED, "the path of the LoRA cannot be resolved") from None
