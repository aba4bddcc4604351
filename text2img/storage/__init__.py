"""Where pictures go. One Protocol; the URL's scheme picks the adapter. Knows bytes and names, no images."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import unquote

from text2img.concurrency.timeouts import run_with_timeout
from text2img.errors import ConfigurationError, ObjectUnreadable, StorageFailed
from text2img.prompts.ids import gcs_url

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from text2img.storage.bucket import Clock, ReadableBucket


LARGEST: Final = 64 * 2**20
"""Bytes of an object that is read back, at the most: a PNG of 4,096×4,096 pixels of noise has fewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageOptions:
    """How objects are kept in a bucket.

    ``acl``: who may read them, as S3's canned ACLs say it (``public-read``); the bucket's own rules without.
    ``public_urls``: ``put`` returns ``https://`` URLs. ``s3_endpoint``: the URL of a service that is not
    Amazon's; by default whatever AWS's own variables and files name.
    """

    acl: str | None = None
    public_urls: bool = False
    s3_endpoint: str | None = None


class ImageStorage(Protocol):
    """A place that keeps objects by name. Safe to use from several threads.

    Names come from ObjectName.of plus an ending: at most 255 bytes of ``A–Z a–z 0–9 . _ - ~ /``, no part
    between slashes empty or starting with a dot.
    """

    def check(self) -> None:
        """Raise StorageFailed, within 20 seconds, where it is plain that nothing could be stored.

        Changes nothing. An account that may write but not look passes.
        """
        ...

    def check_writable(self) -> None:
        """Store a small object of its own and remove it; raises StorageFailed where either fails."""
        ...

    def put(self, name: str, data: bytes, content_type: str, may_replace: Callable[[], bool]) -> str:
        """Store the object and return its URL.

        That is ``gs://bucket/prefix/name`` or ``s3://…``, the public ``https://`` one where such are asked
        for, or the file's absolute path.

        Created only if absent, and whole or not at all. An object of the same content is left alone; a
        different one is replaced only if ``may_replace()`` then says that the claim still holds, and (where
        the service can) only if it is still the one that was looked at. May be repeated.

        Raises ClaimLost where ``may_replace()`` says no, PromptFailed (``storage_rejected``) where this one
        object is refused, StorageFailed where every object would be or nobody answers.
        """
        ...

    def read(self, url: str) -> bytes:
        """The content of the object that ``put`` said that URL of, in any of the forms that it can say.

        Changes nothing. Raises Unreadable for a URL outside this place, for an object that is not there, is
        larger than LARGEST, or that this account may not read; StorageFailed where nobody answers.
        """
        ...


def check_name(name: str) -> str:
    """The name itself; ValueError, which is a bug of ours, for one that ObjectName could not have made."""
    if "\0" in name or any(not part or part.startswith(".") for part in name.split("/")):
        raise ValueError(f"{name!r} is no object name")
    return name


def name_in(places: Mapping[str, Callable[[str], str]], url: str) -> str:
    """The name of the object that a URL means. ``places`` are what the URLs of one storage begin with, each
    with how what follows is read. Raises Unreadable for a URL that begins with none, or names no object.
    """
    for place, reading in places.items():
        if url.startswith(place):
            try:
                name = check_name(reading(url.removeprefix(place)))
                name.encode()  # half of a surrogate pair is in no name
            except ValueError:
                break
            return name
    raise ObjectUnreadable(f"{url[:200]!r} is not in {next(iter(places))}; name where it is by --output")


def identity(name: str) -> str:
    """A name that stands in its URL as it is."""
    return name


def percent_decode(name: str) -> str:
    """A name that stands percent-encoded in its URL, as it does in ``https://`` ones."""
    return unquote(name)


def locate(url: str, option: str) -> tuple[str, str, str] | None:
    """The kind (gs or s3), the bucket, and the prefix (empty, or ending in a slash) of such a URL; None for
    any other. Raises ConfigurationError, which names the ``option``, where the rest cannot be read.
    """
    from text2img.storage.bucket import parse

    kind = url.partition("://")[0].lower() if "://" in url else ""
    if kind == "gs":
        from text2img.storage.gcs import is_bucket

        return kind, *parse(url, kind, is_bucket, option)
    if kind == "s3":
        from text2img.storage import s3

        return kind, *parse(url, kind, s3.is_bucket, option)
    return None


def open_bucket(
    kind: str, name: str, options: StorageOptions, patience: float, *, clock: Clock = time
) -> ReadableBucket:
    """A bucket to read from, of ``kind`` gs or s3; one request is tried for ``patience`` seconds by
    that ``clock``.
    """
    if kind == "gs":
        from text2img.storage import gcs_bucket

        return gcs_bucket.Bucket(name, None, patience, 30, clock=clock)
    from text2img.storage import s3_bucket

    return s3_bucket.Bucket(name, options, patience, 30, clock=clock)


def open_storage(url: str, options: StorageOptions | None = None) -> ImageStorage:
    """The adapter for an output URL: ``gs://bucket/prefix``, ``s3://bucket/prefix`` or a folder.

    Touches no network and no file. Raises ConfigurationError for a URL that cannot be read, and for options
    that mean nothing there.
    """
    options = options or StorageOptions()
    scheme, separator, _ = url.partition("://")
    if not separator:
        from text2img.storage.local import LocalStorage

        if options.acl or options.public_urls:
            raise ConfigurationError("--acl and --public-urls are for buckets; a folder has neither")
        return LocalStorage(url)
    if scheme.lower() == "gs":
        from text2img.storage.gcs import GcsStorage

        return GcsStorage(url, options)
    if scheme.lower() == "s3":
        from text2img.storage.s3 import S3Storage

        return S3Storage(url, options)
    raise ConfigurationError(
        f"the output starts with {scheme}://; use gs://BUCKET/PREFIX, s3://BUCKET/PREFIX or a folder"
    )


ENDINGS: Final = (".png", ".jpg", ".jpeg", ".webp")
"""What pictures' files are called; no other file is looked into."""
_MOST: Final = 16
"""Buckets that are kept open: more than anybody has, and fewer than a hostile document could name."""


class Reader:
    """Reads pictures from ``place`` alone, or without it from the folder or bucket that each URL names.

    ``options`` are how a bucket is spoken to; ``patience`` is in seconds, for one picture. Safe to use from
    several threads. Where nobody answered it does not ask again: what was said then is said of all the
    pictures of that place.
    """

    def __init__(self, place: ImageStorage | None, options: StorageOptions, patience: float = 20) -> None:
        self._place = place
        self._options = options
        self._patience = patience
        self._lock = threading.Lock()
        self._opened: dict[str, ImageStorage] = {}
        self._silent: Mapping[str, str] = {}

    def read(self, url: str) -> bytes:
        """A picture's file; raises Unreadable, with the reason, where it cannot be had."""
        kind = "" if self._place else _place_of(url)
        if kind in self._silent:
            raise ObjectUnreadable(self._silent[kind])
        storage = self._place or self._at(kind)
        try:
            return run_with_timeout(
                self._patience, lambda: storage.read(gcs_url(url) or url if kind else url)
            )
        except (StorageFailed, TimeoutError) as exc:
            reason = (
                str(exc) if isinstance(exc, StorageFailed) else f"no answer within {self._patience:g} seconds"
            )
            self._silent = {**self._silent, kind: reason}
            raise ObjectUnreadable(reason) from exc

    def _at(self, place: str) -> ImageStorage:
        with self._lock:
            if place not in self._opened:
                if len(self._opened) >= _MOST:
                    self._opened.pop(next(iter(self._opened)))
                self._opened[place] = _opened(place, self._options)
            return self._opened[place]


def _place_of(url: str) -> str:
    """The folder, or the bucket as ``scheme://name``, that a URL is in."""
    if url.startswith("/"):
        if not url.lower().endswith(ENDINGS):
            raise ObjectUnreadable(f"{url[:200]!r} is not called as a picture is")
        return url.rpartition("/")[0] or "/"
    scheme, _, rest = (gcs_url(url) or url).partition("://")
    if scheme not in {"gs", "s3"}:
        raise ObjectUnreadable(f"{url[:200]!r} says no place that can be read; name where it is by --output")
    return f"{scheme}://{rest.partition('/')[0]}"


def _opened(place: str, options: StorageOptions) -> ImageStorage:
    try:
        return open_storage(place, options)
    except ConfigurationError as exc:
        raise ObjectUnreadable(f"{place[:200]!r} is no place that can be read: {exc}") from exc
