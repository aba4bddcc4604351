"""Image storage in a Google Cloud Storage bucket: ImageStorage's rules in terms of its responses.

Only ``gcs_bucket`` uses Google's library. It is imported when the bucket is first needed.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
from typing import TYPE_CHECKING

from text2img.concurrency.timeouts import run_with_timeout
from text2img.errors import BucketMissing, PromptFailed, StorageFailed
from text2img.prompts.ids import public_gcs_url
from text2img.settings import check_certificate_variables, check_url_variables
from text2img.storage import (
    MAX_OBJECT_BYTES,
    StorageOptions,
    check_name,
    classify_as_ours,
    identity,
    object_name,
    percent_decode,
)
from text2img.storage.bucket import (
    ABSENT,
    PermanentError,
    Target,
    create_or_replace,
    endpoint_checked,
    parse,
    read_whole,
    rejected,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from text2img.storage import Classify
    from text2img.storage.bucket import Clock, ObjectInfo
    from text2img.storage.gcs_bucket import Bucket

# Cloud Storage's rules for bucket names: 3–63 characters, or up to 222 if dots divide it.
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


def check_environment() -> None:
    """Raise ConfigurationError for variables that Google's client could not use."""
    check_url_variables("STORAGE_EMULATOR_HOST")
    check_certificate_variables("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def _endpoint() -> tuple[str, str]:
    """Return what names the service in an error, and its URL if it is an emulator's."""
    url = os.environ.get("STORAGE_EMULATOR_HOST", "")
    return ("STORAGE_EMULATOR_HOST" if url else "Cloud Storage"), url


class GcsStorage:
    """An ImageStorage over ``gs://bucket/prefix`` (the prefix may be empty).

    ``retry_timeout``: the seconds for which one call retries transient errors (408, 429, 5xx, connections),
    including all waits. ``timeout``: the seconds one request may go without a response. ``clock`` counts the
    seconds, and sleeps between the attempts.
    """

    def __init__(
        self,
        url: str,
        options: StorageOptions | None = None,
        *,
        retry_timeout: float = 60,
        timeout: float = 30,
        clock: Clock = time,
    ) -> None:
        self._bucket_name, self._prefix = parse(url, "gs", is_bucket)
        check_environment()
        self._options = options or StorageOptions()
        self._retry_timeout = retry_timeout
        self._timeout = timeout
        self._clock = clock
        self._opening = threading.Lock()
        self._opened: Bucket | None = None

    def check(self) -> None:
        """Check that the bucket exists by requesting its metadata; see ImageStorage.check."""
        try:
            with endpoint_checked(*_endpoint()):
                run_with_timeout(19, lambda: self._bucket().check_bucket(retry_timeout=8))
        except TimeoutError as exc:
            raise StorageFailed(f"{self._url()} does not answer; check the network and --output") from exc
        except PermanentError as exc:
            if exc.status == 404:
                raise BucketMissing(str(self._storage_error(exc))) from exc
            if exc.status != 403:  # an account that may only write may not read the metadata
                raise self._storage_error(exc) from exc

    def check_writable(self) -> None:
        """Store and delete a test object; see ImageStorage.check_writable.

        Needs storage.objects.create and storage.objects.delete.
        """
        name = f"doctor-{secrets.token_hex(8)}.txt"
        try:
            with endpoint_checked(*_endpoint()):
                self.put(name, b"text2img doctor", "text/plain", lambda: True)
            self._bucket().delete(self._prefix + name)
        except PermanentError as exc:
            raise StorageFailed(
                f"{self._url()}{name} was stored but not deleted ({exc}); grant storage.objects.delete"
            ) from exc
        except PromptFailed as exc:
            raise StorageFailed(str(exc)) from exc

    def put(
        self,
        name: str,
        data: bytes,
        content_type: str,
        may_replace: Callable[[], bool],
        classify: Classify = classify_as_ours,
    ) -> str:
        """Store the object, created and replaced by generation match; see ImageStorage.put.

        An account that may not read an existing object (no storage.objects.get) cannot compare it. While the
        claim holds, it replaces any object. If it may not replace it either, the object is rejected, since
        the existing one may be another image.
        """
        path = self._prefix + check_name(name)
        target = Target(
            upload=lambda version: self._upload(path, data, content_type, version),
            lookup=lambda: self._lookup(path),
            read=lambda version: self._bucket().read(path, version, 0, MAX_OBJECT_BYTES + 1),
        )
        create_or_replace(self._url() + name, data, target, may_replace, classify)
        return public_gcs_url(self._bucket_name, path) if self._options.public_urls else self._url() + name

    def read(self, url: str) -> bytes:
        """Return the object's content; needs storage.objects.get. See ImageStorage.read."""
        public = public_gcs_url(self._bucket_name, self._prefix)
        name = object_name({self._url(): identity, public: percent_decode}, url)
        return read_whole(self._bucket(), self._prefix + name, self._url() + name)

    def _upload(self, path: str, data: bytes, content_type: str, version: str | None) -> bool:
        """Replace that generation (None: any); return False if the object has another generation."""
        try:
            self._bucket().upload(path, data, content_type, version)
        except PermanentError as exc:
            if self._forbids_acl(exc):
                raise self._storage_error(exc) from exc
            # Without storage.objects.delete the service may answer 403, not 412, for an existing object.
            exists = exc.status == 403 and "storage.objects.delete" in exc.reason
            if exc.status == 412 or (exists and version == ABSENT):
                return False
            raise self._upload_error(exc, path, creating=version == ABSENT) from exc
        return True

    def _lookup(self, path: str) -> ObjectInfo | None:
        """Return the stored object, None if there is none, or UNKNOWN if this account may not read it."""
        from text2img.storage.gcs_bucket import UNKNOWN

        try:
            return self._bucket().lookup(path)
        except PermanentError as exc:
            if exc.status == 404:
                return None
            if exc.status == 403:
                return UNKNOWN
            raise self._storage_error(exc) from exc

    def _upload_error(
        self, exc: PermanentError, path: str, *, creating: bool
    ) -> StorageFailed | PromptFailed:
        """Return the error of a failed upload: StorageFailed ends the run, PromptFailed this prompt."""
        if exc.status == 403 and not creating:
            return rejected(
                f"gs://{self._bucket_name}/{path}",
                "an object exists already and this account may not compare or replace it; grant "
                "storage.objects.get and storage.objects.delete, or delete the object",
            )
        requester_pays = "requester pays" in exc.reason.lower()  # a 400 for every object
        if exc.status in {400, 413, 414, 422} and not requester_pays:
            return rejected(f"gs://{self._bucket_name}/{path}", str(exc))
        return self._storage_error(exc)

    def _forbids_acl(self, exc: PermanentError) -> bool:
        """Return True if the bucket allows no ACLs, or no public ones; its status is 400 or even 412."""
        causes = ("uniform bucket-level access", "public access prevention")
        return self._options.acl is not None and any(cause in exc.reason.lower() for cause in causes)

    def _storage_error(self, exc: PermanentError) -> StorageFailed:
        if self._forbids_acl(exc):
            return StorageFailed(
                f"the bucket {self._bucket_name} does not allow --acl {self._options.acl}; omit it and "
                f"grant read access in the bucket's IAM policy: {exc.reason}"
            )
        if exc.status == 404:
            return StorageFailed(
                f"the bucket {self._bucket_name} does not exist; create it or check --output"
            )
        if exc.status == 401:
            return StorageFailed(f"Google rejects the credentials for {self._url()}: {exc.reason}")
        if exc.status == 403:
            return StorageFailed(
                f"this account may not write to {self._url()}; grant it storage.objects.create (and "
                f"storage.objects.get and storage.objects.delete, to replace): {exc.reason}"
            )
        return StorageFailed(f"Cloud Storage rejects {self._url()}: {exc}")

    def _url(self) -> str:
        return f"gs://{self._bucket_name}/{self._prefix}"

    def _bucket(self) -> Bucket:
        from text2img.storage.gcs_bucket import Bucket

        with self._opening:
            if self._opened is None:
                self._opened = Bucket(
                    self._bucket_name,
                    self._options.acl,
                    self._retry_timeout,
                    self._timeout,
                    clock=self._clock,
                )
            return self._opened


def is_bucket(name: str) -> bool:
    """Check a name by Cloud Storage's rules for bucket names."""
    parts = name.split(".")
    return bool(_BUCKET.fullmatch(name)) and all(0 < len(part) <= 63 for part in parts)
