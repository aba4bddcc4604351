"""Pictures read back by their URLs, wherever those say that they are. Knows no database and no images.

Who can write to the database can write any URL: one that is not harmless to read is not read.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from text2img.concurrency.timeouts import within
from text2img.errors import ConfigurationError, StorageFailed, Unreadable
from text2img.prompts.object_names import gcs_url
from text2img.storage import ImageStorage, StorageOptions, open_storage

if TYPE_CHECKING:
    from collections.abc import Mapping

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
            raise Unreadable(self._silent[kind])
        storage = self._place or self._at(kind)
        try:
            return within(self._patience, lambda: storage.read(gcs_url(url) or url if kind else url))
        except (StorageFailed, TimeoutError) as exc:
            reason = (
                str(exc) if isinstance(exc, StorageFailed) else f"no answer within {self._patience:g} seconds"
            )
            self._silent = {**self._silent, kind: reason}
            raise Unreadable(reason) from exc

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
            raise Unreadable(f"{url[:200]!r} is not called as a picture is")
        return url.rpartition("/")[0] or "/"
    scheme, _, rest = (gcs_url(url) or url).partition("://")
    if scheme not in {"gs", "s3"}:
        raise Unreadable(f"{url[:200]!r} says no place that can be read; name where it is by --output")
    return f"{scheme}://{rest.partition('/')[0]}"


def _opened(place: str, options: StorageOptions) -> ImageStorage:
    try:
        return open_storage(place, options)
    except ConfigurationError as exc:
        raise Unreadable(f"{place[:200]!r} is no place that can be read: {exc}") from exc
