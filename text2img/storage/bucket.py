"""Code shared by the bucket adapters: protocols, URL parsing, create-only uploads, reads and retries."""

from __future__ import annotations

import re
import secrets
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from tenacity import Retrying, retry_if_exception_type, wait_exponential

from text2img.concurrency.timeouts import stop_after_deadline
from text2img.errors import (
    ClaimLost,
    ConfigurationError,
    ErrorCode,
    ObjectUnreadable,
    PromptFailed,
    StorageFailed,
)
from text2img.storage import FOREIGN_REASON, MAX_OBJECT_BYTES, Existing, classify_as_ours

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from text2img.storage import Classify

_Result = TypeVar("_Result")
_PREFIX = re.compile(r"[^\x00-\x1f\x7f?#*\[\]\\]*")
_MAX_PREFIX_BYTES = 760  # an object's whole name may have 1,024 bytes, the part after the prefix 255
_MAX_UPLOADS = 5  # upload attempts for an object that other writers keep changing
_BACKOFF = wait_exponential(multiplier=0.5, max=16)  # seconds: 0.5, 1, 2 … 16

_REASONS: Final = {404: "it does not exist", 403: "this account may not read it"}

ABSENT: Final = ""
"""The version to replace when no object may exist yet."""


class PermanentError(Exception):
    """A rejection that a retry would not change: HTTP ``status`` (3xx, 4xx) and the service's ``reason``.

    ``code`` is the service's error code, empty if it has none.
    """

    def __init__(self, status: int, reason: str, code: str = "") -> None:
        super().__init__(f"{status} {reason}")
        self.status = status
        self.reason = reason
        self.code = code


class TransientError(StorageFailed):
    """A failure that a retry may fix: the network, or a service that is busy."""


class EndpointFailed(StorageFailed):
    """The service's URL or certificate is at fault; a retry would not change that."""


@contextmanager
def endpoint_checked(option: str, url: str) -> Iterator[None]:
    """Raise ConfigurationError, which names the option, for errors that come from the service's URL.

    To plain HTTP, a server that uses TLS answers 400 in no form of the service's.
    """
    try:
        yield
    except EndpointFailed as exc:
        raise ConfigurationError(f"{option}: {exc}") from exc
    except (PermanentError, PromptFailed, StorageFailed) as exc:
        cause = exc if isinstance(exc, PermanentError) else exc.__cause__
        unexplained = isinstance(cause, PermanentError) and cause.reason in {"Bad Request", "BadRequest"}
        if unexplained and url.startswith("http://"):
            raise ConfigurationError(
                f"{option}: the server answers 400 to http://; write https:// if it accepts TLS only"
            ) from exc
        raise


class Clock(Protocol):
    """A source of time that can also sleep; the module ``time`` is one."""

    def monotonic(self) -> float:
        """Return the seconds since some fixed moment."""
        ...

    def sleep(self, seconds: float, /) -> None:
        """Return after that many seconds."""
        ...


@dataclass(frozen=True, slots=True)
class FunctionClock:
    """A Clock made of two functions."""

    sleep: Callable[[float], None]
    monotonic: Callable[[], float]


class ObjectInfo(Protocol):
    """A stored object that an upload is compared with."""

    @property
    def version(self) -> str | None:
        """The generation or ETag, which changes with the object; None if this account may not read it."""
        ...

    @property
    def size(self) -> int | None:
        """The size in bytes; None if this account may not read the object."""
        ...

    def holds(self, data: bytes) -> bool:
        """Return True if the object's content is ``data``, and False if it differs or is unknown."""
        ...


class ObjectLookup(Protocol):
    """The metadata of an object that may be read."""

    @property
    def version(self) -> str | None:
        """The generation or ETag, which changes with the object."""
        ...

    @property
    def size(self) -> int | None:
        """The size in bytes."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """The object to store, as its bucket's adapter writes and reads it.

    ``upload(version)`` replaces that version (ABSENT: only creates; None: replaces any) and returns False if
    the stored object has another version. ``lookup()`` returns the stored object, or None. ``read(version)``
    returns its bytes; it raises PermanentError as ReadableBucket.read does.
    """

    upload: Callable[[str | None], bool]
    lookup: Callable[[], ObjectInfo | None]
    read: Callable[[str | None], bytes]


@dataclass(frozen=True, slots=True)
class ListEntry:
    """An object in a listing: whole name, size in bytes, version (generation or ETag) and checksum.

    Objects with the same content have the same checksum.
    """

    path: str
    size: int
    version: str
    checksum: str


class Checksum(Protocol):
    """A checksum in progress, with the interface of hashlib's."""

    def update(self, data: bytes, /) -> object:
        """Add the next piece of data."""
        ...

    def digest(self) -> bytes:
        """Return the checksum of all pieces so far."""
        ...


class ReadableBucket(Protocol):
    """A bucket to read from.

    Its methods raise PermanentError for a rejection that a retry would not change, and StorageFailed for
    every other failure.
    """

    def objects(self, prefix: str, max_count: int) -> list[ListEntry]:
        """List the objects whose names start with ``prefix``, at most ``max_count``."""
        ...

    def checksum(self, listed: ListEntry) -> tuple[Checksum, bytes] | None:
        """Return an empty checksum to feed with the object's content, and the digest it must have.

        None if the service reports no checksum that can be computed here.
        """
        ...

    def lookup(self, path: str) -> ObjectLookup:
        """Return the object's metadata."""
        ...

    def read(self, path: str, version: str | None, start: int, end: int) -> bytes:
        """Return the bytes from ``start`` to before ``end``.

        Raises PermanentError (412) if the object no longer has that version.
        """
        ...


def create_or_replace(
    url: str,
    data: bytes,
    target: Target,
    may_replace: Callable[[], bool],
    classify: Classify,
) -> None:
    """Store an object by the rules of ImageStorage.put; ``url`` is for error messages.

    An account that may not read the object cannot compare it; while the claim holds, it replaces any object.
    """
    version: str | None = ABSENT
    for _ in range(_MAX_UPLOADS):
        if target.upload(version):
            return
        version = ABSENT
        if (stored := target.lookup()) is None:
            continue
        if stored.holds(data):
            return
        try:
            existing = _classified(target, stored, classify)
        except _ChangedError:
            continue
        if existing is Existing.SAME:
            return
        if not may_replace():
            raise ClaimLost(f"{url} exists already and the claim is lost")
        if existing is Existing.FOREIGN:
            raise rejected(url, FOREIGN_REASON)
        version = stored.version
    raise rejected(url, "it keeps changing; check whether other jobs write there")


class _ChangedError(Exception):
    """The object has been replaced or deleted since it was looked up."""


def _classified(target: Target, stored: ObjectInfo, classify: Classify) -> Existing:
    """Return what the stored object is; OURS if this account may not read it. Raises _ChangedError."""
    if stored.size is None or classify is classify_as_ours:
        return Existing.OURS
    if stored.size > MAX_OBJECT_BYTES:
        return Existing.FOREIGN
    try:
        return classify(target.read(stored.version))
    except PermanentError as exc:
        if exc.status in {404, 412}:
            raise _ChangedError from exc
        if exc.status == 416:  # an empty object has no first byte
            return classify(b"")
        # An object in an archive is no question of rights: it must be restored before it can be read.
        forbidden = exc.status == 403 and exc.code != "InvalidObjectState"
        return Existing.OURS if forbidden else Existing.FOREIGN


def read_whole(bucket: ReadableBucket, path: str, url: str) -> bytes:
    """Read an object in one request by the rules of ImageStorage.read; ``url`` is for error messages."""
    try:
        data = bucket.read(path, None, 0, MAX_OBJECT_BYTES + 1)
    except PermanentError as exc:
        if exc.status == 416:  # an empty object has no first byte
            return b""
        raise ObjectUnreadable(f"{url} cannot be read: {_REASONS.get(exc.status, str(exc))}") from exc
    if len(data) > MAX_OBJECT_BYTES:
        raise ObjectUnreadable(f"{url} is larger than {MAX_OBJECT_BYTES >> 20} MiB")
    return data


def rejected(url: str, reason: str) -> PromptFailed:
    """Return the failure of the one prompt whose object the storage rejected."""
    return PromptFailed(ErrorCode.STORAGE_REJECTED, f"{url} could not be stored: {reason}")


def retry(
    attempt: Callable[[float], _Result],
    retry_timeout: float,
    timeout: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> _Result:
    """Call ``attempt`` until it succeeds, for ``retry_timeout`` seconds; only TransientError is retried.

    The waits between attempts grow to 16 s. ``attempt`` receives the seconds that it may take: ``timeout``,
    or what is left of ``retry_timeout`` if that is less, but at least one second. ``clock`` counts the
    seconds. ``sleep`` may raise to stop the retries.
    """
    deadline = clock() + retry_timeout
    retrying = Retrying(
        retry=retry_if_exception_type(TransientError),
        wait=lambda state: _BACKOFF(state) * secrets.SystemRandom().uniform(0.5, 1),
        stop=stop_after_deadline(deadline, clock),
        sleep=sleep,
        reraise=True,
    )
    return retrying(lambda: attempt(min(timeout, max(1.0, deadline - clock()))))


def one_line(text: object) -> str:
    """Return a service's message on one line, cut to 200 characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= 200 else f"{line[:199]}…"


def parse(
    url: str, scheme: str, is_bucket: Callable[[str], bool], option: str = "--output"
) -> tuple[str, str]:
    """Return the bucket and the prefix (empty, or ending in a slash) of ``scheme://bucket/prefix``.

    Raises ConfigurationError, which names the ``option``, for any other URL.
    """
    given, _, rest = url.strip().partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    if given.lower() != scheme or not is_bucket(bucket):
        raise ConfigurationError(
            f"{bucket!r} is not a valid bucket name; write {option} {scheme}://BUCKET/PREFIX"
        )
    if not prefix:
        return bucket, ""
    if not all(_is_part(part) for part in prefix.split("/")):
        raise ConfigurationError(
            f"the prefix in {option} has an empty or invalid part; write {scheme}://BUCKET/PREFIX"
        )
    if len(prefix.encode()) >= _MAX_PREFIX_BYTES:
        raise ConfigurationError(f"the prefix in {option} is longer than {_MAX_PREFIX_BYTES} bytes")
    return bucket, f"{prefix}/"


def _is_part(part: str) -> bool:
    lone = any("\ud800" <= char <= "\udfff" for char in part)
    return part.strip() not in {"", ".", ".."} and bool(_PREFIX.fullmatch(part)) and not lone
