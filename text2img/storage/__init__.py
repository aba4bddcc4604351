"""Image storage: the ImageStorage protocol, its adapters by URL scheme, and a reader of stored images.

Storage handles only names and bytes, whatever the objects contain.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import unquote

from text2img.concurrency.timeouts import run_with_timeout
from text2img.errors import ConfigurationError, ObjectUnreadable, StorageFailed
from text2img.prompts.ids import gcs_url

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from text2img.storage.bucket import Clock, ReadableBucket

    Classify = Callable[[bytes], "Existing"]


class Existing(Enum):
    """What a different object is that exists already under the name of a new one."""

    SAME = "same"  # it is as good as the new one, and is left alone
    OURS = "ours"  # it may be replaced
    FOREIGN = "foreign"  # it belongs to another writer: never replaced


FOREIGN_REASON: Final = (
    "another object has this name already, and it is not one that this database recorded for this prompt;"
    " move or delete it, or choose another --output"
)


def classify_as_ours(existing: bytes) -> Existing:  # noqa: ARG001 - a Classify that needs no look
    """Return OURS for every object, where all objects of the name are the caller's own."""
    return Existing.OURS


MAX_OBJECT_BYTES: Final = 64 * 2**20
"""The largest object that is read back. A PNG of 4,096×4,096 pixels of noise is smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageOptions:
    """Options for the objects in a bucket.

    ``acl``: who may read them, as an S3 canned ACL (``public-read``); without one the bucket's own rules
    apply. ``public_urls``: ``put`` returns ``https://`` URLs. ``s3_endpoint``: the URL of a service that is
    not Amazon's; the default comes from AWS's own variables and files.
    """

    acl: str | None = None
    public_urls: bool = False
    s3_endpoint: str | None = None


class ImageStorage(Protocol):
    """A store of objects by name. Safe to use from several threads.

    Names come from ObjectName.of plus an ending. They have at most 255 bytes of ``A–Z a–z 0–9 . _ - ~ /``;
    no part between slashes is empty or starts with a dot.
    """

    def check(self) -> None:
        """Raise StorageFailed, within 20 seconds, if it is certain that nothing can be stored.

        Changes nothing. An account that may write but not read passes.
        """
        ...

    def check_writable(self) -> None:
        """Store a small test object and remove it; raise StorageFailed if either fails."""
        ...

    def put(
        self,
        name: str,
        data: bytes,
        content_type: str,
        may_replace: Callable[[], bool],
        classify: Classify = classify_as_ours,
    ) -> str:
        """Store the object and return its URL.

        The URL is ``gs://bucket/prefix/name`` or ``s3://…``, the public ``https://`` URL if those are
        enabled, or the file's absolute path.

        The object is created only if absent, and appears whole or not at all. An object with the same
        content is left alone, and so is one whose content is SAME for ``classify``. Any other one is replaced
        only if it is OURS and ``may_replace()`` then confirms that the claim still holds. Where the service
        supports it, the replacement also requires that the object has not changed since it was compared. An
        object that this account may not read counts as OURS. Calling it again is safe.

        Raises ClaimLost if ``may_replace()`` returns False, PromptFailed (``storage_rejected``) if a FOREIGN
        object exists or if the storage refuses this one object, and StorageFailed if it refuses every object
        or does not answer.
        """
        ...

    def read(self, url: str) -> bytes:
        """Return the content of the object whose URL ``put`` returned, in any of the URL's forms.

        Changes nothing. Raises ObjectUnreadable for a URL outside this storage, for a missing or forbidden
        object, and for one larger than MAX_OBJECT_BYTES. Raises StorageFailed if the storage does not answer.
        """
        ...


def check_name(name: str) -> str:
    """Return the name, or raise ValueError (a bug) for one that ObjectName cannot produce."""
    if "\0" in name or any(not part or part.startswith(".") for part in name.split("/")):
        raise ValueError(f"{name!r} is not a valid object name")
    return name


def object_name(decoders: Mapping[str, Callable[[str], str]], url: str) -> str:
    """Return the name of the object that a URL refers to.

    ``decoders`` maps the prefixes of one storage's URLs to the function that decodes the rest. Raises
    ObjectUnreadable for a URL that has none of these prefixes, or names no object.
    """
    for prefix, decode in decoders.items():
        if url.startswith(prefix):
            try:
                name = check_name(decode(url.removeprefix(prefix)))
                name.encode()  # no name contains half of a surrogate pair
            except ValueError:
                break
            return name
    raise ObjectUnreadable(f"{url[:200]!r} is not in {next(iter(decoders))}; set --output to its location")


def identity(name: str) -> str:
    """Return a name that its URL contains unchanged."""
    return name


def percent_decode(name: str) -> str:
    """Decode a name that its URL contains percent-encoded, as ``https://`` URLs do."""
    return unquote(name)


def locate(url: str, option: str) -> tuple[str, str, str] | None:
    """Return the kind (gs or s3), the bucket and the prefix of a bucket URL, or None for any other URL.

    The prefix is empty or ends in a slash. Raises ConfigurationError, which names the ``option``, if the
    rest of the URL is invalid.
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
    kind: str, name: str, options: StorageOptions, retry_timeout: float, *, clock: Clock = time
) -> ReadableBucket:
    """Open a bucket for reading; ``kind`` is gs or s3.

    Each request is retried for ``retry_timeout`` seconds of ``clock``.
    """
    if kind == "gs":
        from text2img.storage import gcs_bucket

        return gcs_bucket.Bucket(name, None, retry_timeout, 30, clock=clock)
    from text2img.storage import s3_bucket

    return s3_bucket.Bucket(name, options, retry_timeout, 30, clock=clock)


def check_environment(kind: str, options: StorageOptions) -> None:
    """Raise ConfigurationError for variables that a bucket's client could not use; ``kind`` is gs or s3."""
    from text2img.storage import gcs, s3

    if kind == "gs":
        gcs.check_environment()
    else:
        s3.check_environment(options.s3_endpoint)


def open_storage(url: str, options: StorageOptions | None = None) -> ImageStorage:
    """Return the adapter for an output URL: ``gs://bucket/prefix``, ``s3://bucket/prefix`` or a folder.

    Touches neither the network nor any file. Raises ConfigurationError for an invalid URL, and for options
    that do not apply to it.
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
"""Endings of image files; files with other endings are not read."""
_MAX_OPEN: Final = 16
"""Storages kept open: more than any setup uses, and fewer than a hostile document could name."""


class ImageReader:
    """A reader of stored images, from ``storage`` alone or else from the folder or bucket in each URL.

    ``options`` apply to buckets; ``timeout`` is in seconds, for one image. A location that did not answer is
    not contacted again: its error is raised for all of its images. Safe to use from several threads.
    """

    def __init__(self, storage: ImageStorage | None, options: StorageOptions, timeout: float = 20) -> None:
        self._storage = storage
        self._options = options
        self._timeout = timeout
        self._lock = threading.Lock()
        self._opened: dict[str, ImageStorage] = {}
        self._unreachable: Mapping[str, str] = {}

    def read(self, url: str) -> bytes:
        """Return the image's file; raise ObjectUnreadable, with the reason, if that fails."""
        location = "" if self._storage else _location(url)
        if location in self._unreachable:
            raise ObjectUnreadable(self._unreachable[location])
        storage = self._storage or self._storage_at(location)
        try:
            return run_with_timeout(
                self._timeout, lambda: storage.read(gcs_url(url) or url if location else url)
            )
        except (StorageFailed, TimeoutError) as exc:
            reason = (
                str(exc) if isinstance(exc, StorageFailed) else f"no answer within {self._timeout:g} seconds"
            )
            self._unreachable = {**self._unreachable, location: reason}
            raise ObjectUnreadable(reason) from exc

    def _storage_at(self, location: str) -> ImageStorage:
        with self._lock:
            if location not in self._opened:
                if len(self._opened) >= _MAX_OPEN:
                    self._opened.pop(next(iter(self._opened)))
                self._opened[location] = _open(location, self._options)
            return self._opened[location]


def find_moved(url: str, folder: Path | None) -> str:
    """Return where an image file is: at its path or, if nothing is there, at the end of it below ``folder``.

    So the images of a folder that was moved or copied, with its database, are found: of
    ``/old/out/results/7/1.png`` first ``folder/old/out/results/7/1.png``, then ``folder/out/results/7/1.png``
    and so on. Any other URL, and one that is found nowhere, is returned unchanged.
    """
    if folder is None or not url.startswith("/") or not url.lower().endswith(ENDINGS) or "\0" in url:
        return url
    try:
        parts = Path(url).parts[1:]
        if os.path.lexists(url) or ".." in parts:
            return url
        candidates = (folder.joinpath(*parts[start:]) for start in range(len(parts)))
        return next((str(path) for path in candidates if path.is_file()), url)
    except (OSError, ValueError):  # too long, or half of a surrogate pair
        return url


def _location(url: str) -> str:
    """Return the folder, or the bucket as ``scheme://name``, that contains a URL's object."""
    if url.startswith("/"):
        if not url.lower().endswith(ENDINGS):
            raise ObjectUnreadable(f"{url[:200]!r} does not end like an image file ({', '.join(ENDINGS)})")
        return url.rpartition("/")[0] or "/"
    scheme, _, rest = (gcs_url(url) or url).partition("://")
    if scheme not in {"gs", "s3"}:
        raise ObjectUnreadable(f"{url[:200]!r} is not in a folder or bucket; set --output to its location")
    return f"{scheme}://{rest.partition('/')[0]}"


def _open(location: str, options: StorageOptions) -> ImageStorage:
    try:
        return open_storage(location, options)
    except ConfigurationError as exc:
        raise ObjectUnreadable(f"{location[:200]!r} cannot be opened: {exc}") from exc
