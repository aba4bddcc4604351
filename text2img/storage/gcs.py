"""Pictures in a Google Cloud Storage bucket: who may create, compare and replace what.

Knows the rules of ImageStorage and what Cloud Storage's answers mean for them. Google's library is known
to ``gcs_bucket`` alone and is imported when the bucket is first needed.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from typing import TYPE_CHECKING

from text2img.concurrency.timeouts import run_with_timeout
from text2img.errors import PromptFailed, StorageFailed
from text2img.prompts.ids import public_gcs_url
from text2img.storage import StorageOptions, check_name, identity, name_in, percent_decode
from text2img.storage.bucket import ABSENT, PermanentError, create_or_replace, parse, read_whole, rejected

if TYPE_CHECKING:
    from collections.abc import Callable

    from text2img.storage.bucket import Clock, ObjectInfo
    from text2img.storage.gcs_bucket import Bucket

# Cloud Storage's rules for bucket names: 3–63 characters, or up to 222 where dots part it.
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


class GcsStorage:
    """An ImageStorage over ``gs://bucket/prefix`` (the prefix may be empty).

    ``patience``: seconds for which one call tries again after faults that may pass (408, 429, 5xx,
    connections), all its waits together. ``timeout``: seconds one request may be silent. ``clock``
    counts the seconds, and sleeps between the tries.
    """

    def __init__(
        self,
        url: str,
        options: StorageOptions | None = None,
        *,
        patience: float = 60,
        timeout: float = 30,
        clock: Clock = time,
    ) -> None:
        self._bucket_name, self._prefix = parse(url, "gs", is_bucket)
        self._options = options or StorageOptions()
        self._patience = patience
        self._timeout = timeout
        self._clock = clock
        self._opening = threading.Lock()
        self._opened: Bucket | None = None

    def check(self) -> None:
        """As ImageStorage.check: asks for the bucket's metadata."""
        try:
            run_with_timeout(19, lambda: self._bucket().look_at_bucket(patience=8))
        except TimeoutError as exc:
            raise StorageFailed(f"{self._url()} got no answer; check the network and --output") from exc
        except PermanentError as exc:
            if exc.status != 403:  # an account that may only write is not allowed to ask
                raise self._failed(exc) from exc

    def check_writable(self) -> None:
        """As ImageStorage.try_write; needs storage.objects.create and storage.objects.delete."""
        name = f"doctor-{secrets.token_hex(8)}.txt"
        try:
            self.put(name, b"text2img doctor", "text/plain", lambda: True)
            self._bucket().delete(self._prefix + name)
        except PermanentError as exc:
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
        create_or_replace(
            self._url() + name,
            data,
            lambda version: self._upload(path, data, content_type, version),
            lambda: self._look(path),
            may_replace,
        )
        return public_gcs_url(self._bucket_name, path) if self._options.public_urls else self._url() + name

    def read(self, url: str) -> bytes:
        """As ImageStorage.read; needs storage.objects.get."""
        public = public_gcs_url(self._bucket_name, self._prefix)
        name = name_in({self._url(): identity, public: percent_decode}, url)
        return read_whole(self._bucket(), self._prefix + name, self._url() + name)

    def _upload(self, path: str, data: bytes, content_type: str, version: str | None) -> bool:
        """Store the object over that generation (None: over any); False where another one is there."""
        try:
            self._bucket().upload(path, data, content_type, version)
        except PermanentError as exc:
            if self._forbids_acl(exc):
                raise self._failed(exc) from exc
            # Without storage.objects.delete an object that is there may be reported as 403 before 412.
            there = exc.status == 403 and "storage.objects.delete" in exc.reason
            if exc.status == 412 or (there and version == ABSENT):
                return False
            raise self._upload_error(exc, path, creating=version == ABSENT) from exc
        return True

    def _look(self, path: str) -> ObjectInfo | None:
        """What is stored there; None where nothing is. Unknown in all respects where we may not look."""
        from text2img.storage.gcs_bucket import UNSEEN

        try:
            return self._bucket().look(path)
        except PermanentError as exc:
            if exc.status == 404:
                return None
            if exc.status == 403:
                return UNSEEN
            raise self._failed(exc) from exc

    def _upload_error(
        self, exc: PermanentError, path: str, *, creating: bool
    ) -> StorageFailed | PromptFailed:
        """What a refused upload means: the end of the run, or of this one prompt."""
        if exc.status == 403 and not creating:
            return rejected(
                f"gs://{self._bucket_name}/{path}",
                "an object is there already and this account may not compare or replace it; grant "
                "storage.objects.get and storage.objects.delete, or delete the object",
            )
        requester_pays = "requester pays" in exc.reason.lower()  # a 400 that every object would get
        if exc.status in {400, 413, 414, 422} and not requester_pays:
            return rejected(f"gs://{self._bucket_name}/{path}", str(exc))
        return self._failed(exc)

    def _forbids_acl(self, exc: PermanentError) -> bool:
        """Whether the bucket takes no ACLs, or none that opens its objects to all: a 400, and even a 412."""
        words = ("uniform bucket-level access", "public access prevention")
        return self._options.acl is not None and any(each in exc.reason.lower() for each in words)

    def _failed(self, exc: PermanentError) -> StorageFailed:
        if self._forbids_acl(exc):
            return StorageFailed(
                f"the bucket {self._bucket_name} does not allow --acl {self._options.acl}; leave it out, and "
                f"let the bucket's IAM policy say who may read: {exc.reason}"
            )
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

    def _url(self) -> str:
        return f"gs://{self._bucket_name}/{self._prefix}"

    def _bucket(self) -> Bucket:
        from text2img.storage.gcs_bucket import Bucket

        with self._opening:
            if self._opened is None:
                self._opened = Bucket(
                    self._bucket_name, self._options.acl, self._patience, self._timeout, clock=self._clock
                )
            return self._opened


def is_bucket(name: str) -> bool:
    """By Cloud Storage's rules for bucket names."""
    parts = name.split(".")
    return bool(_BUCKET.fullmatch(name)) and all(0 < len(part) <= 63 for part in parts)
