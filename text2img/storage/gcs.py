"""Pictures in a Google Cloud Storage bucket: who may create, compare and replace what.

Knows the rules of ImageStorage and what Cloud Storage's answers mean for them. Google's library is known
to ``gcs_bucket`` alone and is imported when the bucket is first needed.
"""

from __future__ import annotations

import re
import secrets
import threading
from typing import TYPE_CHECKING

from text2img.deadline import within
from text2img.errors import ClaimLost, ConfigurationError, ErrorCode, PromptFailed, StorageFailed
from text2img.storage import check_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from text2img.storage.gcs_bucket import Bucket, Stored

# Cloud Storage's rules for bucket names: 3–63 characters, or up to 222 where dots part it.
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_PREFIX = re.compile(r"[^\x00-\x1f\x7f?#*\[\]\\]*")
_LONGEST_PREFIX = 800  # bytes; an object's whole name may have 1,024, a picture's own at most 210
_CREATE_ONLY = 0  # as a generation to match: the object must not exist
_ROUNDS = 5  # how often an object may change under our hands before we give it up


class Refused(Exception):  # noqa: N818 - it says what happened
    """Cloud Storage said no, and would say it again: HTTP ``status`` (4xx), with its ``reason``."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status} {reason}")
        self.status = status
        self.reason = reason


class GcsStorage:
    """An ImageStorage over ``gs://bucket/prefix`` (the prefix may be empty).

    ``patience``: seconds for which one call tries again after faults that may pass (408, 429, 5xx,
    connections), all its waits together. ``timeout``: seconds one request may be silent.
    """

    def __init__(self, url: str, *, patience: float = 60, timeout: float = 30) -> None:
        self._bucket_name, self._prefix = _parse(url)
        self._patience = patience
        self._timeout = timeout
        self._opening = threading.Lock()
        self._opened: Bucket | None = None

    def check(self) -> None:
        """As ImageStorage.check: asks for the bucket's metadata."""
        try:
            within(19, lambda: self._bucket().look_at_bucket(patience=8))
        except TimeoutError as exc:
            raise StorageFailed(f"{self._url()} got no answer; check the network and --output") from exc
        except Refused as exc:
            if exc.status != 403:  # an account that may only write is not allowed to ask
                raise self._failed(exc) from exc

    def try_write(self) -> None:
        """As ImageStorage.try_write; needs storage.objects.create and storage.objects.delete."""
        name = f"doctor-{secrets.token_hex(8)}.txt"
        try:
            self.put(name, b"text2img doctor", "text/plain", lambda: True)
            self._bucket().delete(self._prefix + name)
        except Refused as exc:
            needed = "grant storage.objects.delete"
            raise StorageFailed(f"{self._url()}{name} was stored but not deleted ({exc}); {needed}") from exc
        except PromptFailed as exc:
            raise StorageFailed(str(exc)) from exc

    def put(self, name: str, data: bytes, content_type: str, may_replace: Callable[[], bool]) -> str:
        """As ImageStorage.put; creating and replacing are generation-matched.

        An account that may not look at an object that is there (no storage.objects.get) cannot compare:
        with the claim still held it replaces the object whatever it is, and where it may not do that
        either, the object is rejected rather than taken for the right picture unseen.
        """
        path = self._prefix + check_name(name)
        generation: int | None = _CREATE_ONLY
        for _ in range(_ROUNDS):
            if self._upload(path, data, content_type, generation):
                return self._url() + name
            stored = self._look(path)
            if stored is not None and stored.holds(data):
                return self._url() + name
            generation = _CREATE_ONLY if stored is None else stored.generation
            if stored is not None and not may_replace():
                raise ClaimLost(f"{self._url()}{name} is there already and the claim is lost")
        raise self._rejected(path, "it keeps changing; do other jobs write there?")

    def _upload(self, path: str, data: bytes, content_type: str, generation: int | None) -> bool:
        """Store the object over that generation (None: over any); False where another one is there."""
        try:
            self._bucket().upload(path, data, content_type, generation)
        except Refused as exc:
            # Without storage.objects.delete an object that is there may be reported as 403 before 412.
            there = exc.status == 403 and "storage.objects.delete" in exc.reason
            if exc.status == 412 or (there and generation == _CREATE_ONLY):
                return False
            raise self._upload_error(exc, path, creating=generation == _CREATE_ONLY) from exc
        return True

    def _look(self, path: str) -> Stored | None:
        """What is stored there; None where nothing is. Unknown in all respects where we may not look."""
        from text2img.storage.gcs_bucket import UNSEEN

        try:
            return self._bucket().look(path)
        except Refused as exc:
            if exc.status == 404:
                return None
            if exc.status == 403:
                return UNSEEN
            raise self._failed(exc) from exc

    def _upload_error(self, exc: Refused, path: str, *, creating: bool) -> StorageFailed | PromptFailed:
        """What a refused upload means: the end of the run, or of this one prompt."""
        if exc.status == 403 and not creating:
            return self._rejected(
                path,
                "an object is there already and this account may not compare or replace it; grant "
                "storage.objects.get and storage.objects.delete, or delete the object",
            )
        requester_pays = "requester pays" in exc.reason.lower()  # a 400 that every object would get
        if exc.status in {400, 413, 414, 422} and not requester_pays:
            return self._rejected(path, str(exc))
        return self._failed(exc)

    def _failed(self, exc: Refused) -> StorageFailed:
        if exc.status == 404:
            return StorageFailed(
                f"the bucket {self._bucket_name} does not exist; create it or check --output"
            )
        if exc.status == 401:
            return StorageFailed(f"Google does not accept the credentials for {self._url()}: {exc.reason}")
        if exc.status == 403:
            return StorageFailed(
                f"this account may not write to {self._url()}; grant it storage.objects.create (and "
                f"storage.objects.get and storage.objects.delete, to replace): {exc.reason}"
            )
        return StorageFailed(f"Cloud Storage refuses {self._url()}: {exc}")

    def _rejected(self, path: str, reason: str) -> PromptFailed:
        sentence = f"gs://{self._bucket_name}/{path} could not be stored: {reason}"
        return PromptFailed(ErrorCode.STORAGE_REJECTED, sentence)

    def _url(self) -> str:
        return f"gs://{self._bucket_name}/{self._prefix}"

    def _bucket(self) -> Bucket:
        from text2img.storage.gcs_bucket import Bucket

        with self._opening:
            if self._opened is None:
                self._opened = Bucket(self._bucket_name, self._patience, self._timeout)
            return self._opened


def _parse(url: str) -> tuple[str, str]:
    """The bucket and the prefix (empty, or ending in a slash) of a ``gs://`` URL; else ConfigurationError."""
    scheme, _, rest = url.strip().partition("://")
    bucket, _, prefix = rest.partition("/")
    parts = prefix.strip("/").split("/")
    if scheme.lower() != "gs" or not _is_bucket(bucket):
        raise ConfigurationError(f"{bucket!r} is no bucket's name; write --output gs://BUCKET/PREFIX")
    if prefix.strip("/") and not all(_is_part(part) for part in parts):
        raise ConfigurationError(
            "the prefix in --output holds an empty or odd part; write gs://BUCKET/PREFIX"
        )
    prefix = "".join(f"{part}/" for part in parts if part)
    if len(prefix.encode("utf-8", "surrogatepass")) > _LONGEST_PREFIX:
        raise ConfigurationError(f"the prefix in --output is longer than {_LONGEST_PREFIX} bytes")
    return bucket, prefix


def _is_bucket(name: str) -> bool:
    parts = name.split(".")
    return bool(_BUCKET.fullmatch(name)) and all(0 < len(part) <= 63 for part in parts)


def _is_part(part: str) -> bool:
    lone = any("\ud800" <= char <= "\udfff" for char in part)
    return part.strip() not in {"", ".", ".."} and bool(_PREFIX.fullmatch(part)) and not lone
