"""What buckets have in common, whoever runs them: URLs, creating without overwriting, trying again.

Knows no service and no vendor's library; each adapter brings its own.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from text2img.errors import (
    ClaimLost,
    ConfigurationError,
    ErrorCode,
    ObjectUnreadable,
    PromptFailed,
    StorageFailed,
)
from text2img.storage import LARGEST

if TYPE_CHECKING:
    from collections.abc import Callable

_Result = TypeVar("_Result")
_PREFIX = re.compile(r"[^\x00-\x1f\x7f?#*\[\]\\]*")
_LONGEST_PREFIX = 760  # bytes; an object's whole name may have 1,024, a picture's own at most 255
_ROUNDS = 5  # how often an object may change under our hands before we give it up
_LONGEST_PAUSE = 16.0  # seconds

_REASONS: Final = {404: "it is not there", 403: "this account may not read it"}

ABSENT: Final = ""
"""As the version to write over: no object may be there."""


class PermanentError(Exception):
    """The service said no, and would say it again: HTTP ``status`` (3xx, 4xx), ``reason`` in its words.

    ``code`` is the service's own name for it, empty where it has none.
    """

    def __init__(self, status: int, reason: str, code: str = "") -> None:
        super().__init__(f"{status} {reason}")
        self.status = status
        self.reason = reason
        self.code = code


class TransientError(StorageFailed):
    """What may go better in a moment: the network, or a service that is busy."""


class Clock(Protocol):
    """What counts seconds and lets them pass; the module ``time`` is one."""

    def monotonic(self) -> float:
        """Return the seconds since some moment."""
        ...

    def sleep(self, seconds: float, /) -> None:
        """Return when they have passed."""
        ...


@dataclass(frozen=True, slots=True)
class Waiting:
    """A Clock of two functions."""

    sleep: Callable[[float], None]
    monotonic: Callable[[], float]


class ObjectInfo(Protocol):
    """An object as it is stored."""

    @property
    def version(self) -> str | None:
        """What changes with the object (a generation, an ETag); None where we may not look."""
        ...

    def holds(self, data: bytes) -> bool:
        """Whether the object's content is that; False where it cannot be known."""
        ...


class ObjectLookup(Protocol):
    """An object that may be read. ``version`` changes with it; ``size`` is in bytes."""

    @property
    def version(self) -> str | None:
        """A generation, an ETag."""
        ...

    @property
    def size(self) -> int | None:
        """In bytes."""
        ...


@dataclass(frozen=True, slots=True)
class ListEntry:
    """An object as a listing tells of it: its whole name, bytes, version (a generation, an ETag), and a sum
    of its content, the same for the same content.
    """

    path: str
    size: int
    version: str
    checksum: str


class Sum(Protocol):
    """A checksum that is being made, as hashlib's are."""

    def update(self, data: bytes, /) -> object:
        """Take the next piece."""
        ...

    def digest(self) -> bytes:
        """Of all pieces so far."""
        ...


class ReadableBucket(Protocol):
    """A bucket to read from. Raises Refused for an answer that stays, StorageFailed for all else."""

    def objects(self, prefix: str, most: int) -> list[ListEntry]:
        """The objects whose names begin so, ``most`` of them at the most."""
        ...

    def sum(self, listed: ListEntry) -> tuple[Sum, bytes] | None:
        """How the object's content is summed, and what that must come to; None where the service tells of no
        sum that can be made here.
        """
        ...

    def look(self, path: str) -> ObjectLookup:
        """The object as it is stored."""
        ...

    def read(self, path: str, version: str | None, start: int, end: int) -> bytes:
        """Its bytes from ``start`` to before ``end``, while it is of that version (Refused, 412, else)."""
        ...


def create_or_replace(
    where: str,
    data: bytes,
    upload: Callable[[str | None], bool],
    look: Callable[[], ObjectInfo | None],
    may_replace: Callable[[], bool],
) -> None:
    """Store an object by the rules of ImageStorage.put; ``where`` is its URL, for errors.

    ``upload(version)`` stores it over that version (ABSENT: where there is none, None: over any) and says
    False where another one is there; ``look()`` says what is there. An account that may not look cannot
    compare: with the claim still held it replaces the object whatever it is.
    """
    version: str | None = ABSENT
    for _ in range(_ROUNDS):
        if upload(version):
            return
        stored = look()
        if stored is not None and stored.holds(data):
            return
        version = ABSENT if stored is None else stored.version
        if stored is not None and not may_replace():
            raise ClaimLost(f"{where} is there already and the claim is lost")
    raise rejected(where, "it keeps changing; do other jobs write there?")


def read_whole(bucket: ReadableBucket, path: str, where: str) -> bytes:
    """All of an object by one request, under the rules of ImageStorage.read; ``where`` is its URL."""
    try:
        data = bucket.read(path, None, 0, LARGEST + 1)
    except PermanentError as exc:
        if exc.status == 416:  # it has no first byte
            return b""
        raise ObjectUnreadable(f"{where} cannot be read: {_REASONS.get(exc.status, str(exc))}") from exc
    if len(data) > LARGEST:
        raise ObjectUnreadable(f"{where} is larger than {LARGEST >> 20} MiB")
    return data


def rejected(where: str, reason: str) -> PromptFailed:
    """The failure of the one prompt whose object was refused."""
    return PromptFailed(ErrorCode.STORAGE_REJECTED, f"{where} could not be stored: {reason}")


def retry(
    attempt: Callable[[float], _Result],
    patience: float,
    timeout: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> _Result:
    """Try until it succeeds or raises anything but Faltered, for ``patience`` seconds; waits grow to 16 s.

    ``attempt`` is told how many seconds it may take: ``timeout``, or less where less patience is left, but
    not less than a second for that. ``sleep`` may raise, and so end it; ``clock`` counts the seconds.
    """
    until = clock() + patience
    wait = 0.5
    while True:
        try:
            return attempt(min(timeout, max(1.0, until - clock())))
        except TransientError:
            pause = wait * secrets.SystemRandom().uniform(0.5, 1)
            if clock() + pause > until:
                raise
        sleep(pause)
        wait = min(2 * wait, _LONGEST_PAUSE)


def one_line(text: object) -> str:
    """A service's words on one line, at most 200 characters of them."""
    line = " ".join(str(text).split())
    return line if len(line) <= 200 else f"{line[:199]}…"


def parse(
    url: str, scheme: str, is_bucket: Callable[[str], bool], option: str = "--output"
) -> tuple[str, str]:
    """The bucket and the prefix (empty, or ending in a slash) of ``scheme://bucket/prefix``.

    Raises ConfigurationError, which names the ``option``, where it is none.
    """
    given, _, rest = url.strip().partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    if given.lower() != scheme or not is_bucket(bucket):
        raise ConfigurationError(f"{bucket!r} is no bucket's name; write {option} {scheme}://BUCKET/PREFIX")
    if not prefix:
        return bucket, ""
    if not all(_is_part(part) for part in prefix.split("/")):
        raise ConfigurationError(
            f"the prefix in {option} holds an empty or odd part; write {scheme}://BUCKET/PREFIX"
        )
    if len(prefix.encode()) >= _LONGEST_PREFIX:
        raise ConfigurationError(f"the prefix in {option} is longer than {_LONGEST_PREFIX} bytes")
    return bucket, f"{prefix}/"


def _is_part(part: str) -> bool:
    lone = any("\ud800" <= char <= "\udfff" for char in part)
    return part.strip() not in {"", ".", ".."} and bool(_PREFIX.fullmatch(part)) and not lone
