"""Pictures in a bucket of Amazon S3 or of a service that speaks like it: who may create and replace what.

Knows the rules of ImageStorage and what S3's answers mean for them. boto3 is known to ``s3_bucket`` alone
and is imported when the bucket is first needed.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from typing import TYPE_CHECKING

from text2img.concurrency.timeouts import run_with_timeout
from text2img.errors import ClaimLost, ConfigurationError, PromptFailed, StorageFailed
from text2img.storage import StorageOptions, check_name, identity, name_in, percent_decode
from text2img.storage.bucket import ABSENT, PermanentError, create_or_replace, parse, read_whole, rejected
from text2img.storage.s3_errors import CREDENTIALS, EVERY_OBJECT, LOG_IN, NO_ACLS, REGION

if TYPE_CHECKING:
    from collections.abc import Callable

    from text2img.storage.bucket import Clock, ObjectInfo
    from text2img.storage.s3_bucket import Bucket

log = logging.getLogger(__name__)

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_NUMBERS = re.compile(r"\d+\.\d+\.\d+\.\d+")  # an IP address, which no bucket may look like
_ENDPOINT = re.compile(r"https?://[^\s/@?#]+(/[^\s@?#]*)?")


class S3Storage:
    """An ImageStorage over ``s3://bucket/prefix`` (the prefix may be empty).

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
        self._bucket_name, self._prefix = parse(url, "s3", is_bucket)
        self._options = options or StorageOptions()
        endpoint = self._options.s3_endpoint
        if endpoint is not None and not _ENDPOINT.fullmatch(endpoint):
            raise ConfigurationError(
                "--s3-endpoint must read like https://s3.example.com, without a user or a query"
            )
        self._patience = patience
        self._timeout = timeout
        self._clock = clock
        self._lock = threading.Lock()
        self._opened: Bucket | None = None
        self._conditional = True

    def check(self) -> None:
        """As ImageStorage.check: asks whether the bucket is there."""
        try:
            run_with_timeout(19, lambda: self._bucket().look_at_bucket(patience=8))
        except TimeoutError as exc:
            raise StorageFailed(f"{self._url()} got no answer; check the network and --output") from exc
        except PermanentError as exc:
            # An account that may only write is not allowed to ask.
            if exc.status != 403 or exc.code in CREDENTIALS:
                raise self._failed(exc) from exc

    def check_writable(self) -> None:
        """As ImageStorage.try_write; needs s3:PutObject and s3:DeleteObject.

        Also tries to write over its object, which a service that keeps conditions must not allow.
        """
        name = f"doctor-{secrets.token_hex(8)}.txt"
        try:
            self.put(name, b"text2img doctor", "text/plain", lambda: True)
            kept = self._keeps(name)
            self._bucket().delete(self._prefix + name)
        except PermanentError as exc:
            raise StorageFailed(
                f"{self._url()}{name} was stored but not deleted ({exc}); grant s3:DeleteObject"
            ) from exc
        except PromptFailed as exc:
            raise StorageFailed(str(exc)) from exc
        if not kept:
            raise StorageFailed(
                f"{self._url()} ignores If-None-Match, so that a late worker could overwrite another's "
                "picture; use a service that keeps it"
            )

    def put(self, name: str, data: bytes, content_type: str, may_replace: Callable[[], bool]) -> str:
        """As ImageStorage.put; created with ``If-None-Match: *``, replaced with ``If-Match`` and the ETag.

        An account that may not look at an object that is there cannot compare: with the claim still held it
        replaces the object whatever it is, and where it may not do that either, the object is rejected. The
        same goes for every object where the service has no conditional writes at all.
        """
        path = self._prefix + check_name(name)
        create_or_replace(
            self._url() + name,
            data,
            lambda version: self._upload(path, data, content_type, version),
            lambda: self._look(path),
            may_replace,
        )
        return self._bucket().public_url(path) if self._options.public_urls else self._url() + name

    def read(self, url: str) -> bytes:
        """As ImageStorage.read; needs s3:GetObject."""
        public = self._bucket().public_url(self._prefix)
        name = name_in({self._url(): identity, public: percent_decode}, url)
        return read_whole(self._bucket(), self._prefix + name, self._url() + name)

    def _upload(self, path: str, data: bytes, content_type: str, version: str | None) -> bool:
        """Store the object over that ETag (None: over any); False where another one is there."""
        if not self._conditional:
            if version == ABSENT:
                return False
            version = None
        try:
            self._bucket().upload(path, data, content_type, version)
        except PermanentError as exc:
            if version is not None and exc.status == 501:
                self._do_without_conditions()
                return False
            vanished = exc.status == 404 and exc.code != "NoSuchBucket" and bool(version)
            if version is not None and (exc.status == 412 or vanished):
                return False
            raise self._upload_error(exc, path, creating=version == ABSENT) from exc
        return True

    def _look(self, path: str) -> ObjectInfo | None:
        """What is stored there; None where nothing is. Unknown in all respects where we may not look.

        Where the service has no conditions nothing can be created safely, so that nothing is known to be
        absent either: then only who holds the claim may write.
        """
        from text2img.storage.s3_bucket import UNSEEN

        try:
            return self._bucket().look(path)
        except PermanentError as exc:
            if exc.status == 404:
                return None if self._conditional else UNSEEN
            if exc.status == 403:
                return UNSEEN
            raise self._failed(exc) from exc

    def _do_without_conditions(self) -> None:
        with self._lock:
            if self._conditional:
                log.warning(
                    "%s has no conditional writes (501); pictures are written while their claim holds",
                    self._url(),
                )
            self._conditional = False

    def _keeps(self, name: str) -> bool:
        """Whether the service keeps the object that is there from a writer without a claim."""
        try:
            self.put(name, b"text2img doctor, too late", "text/plain", lambda: False)
        except ClaimLost:
            return True
        return False

    def _upload_error(
        self, exc: PermanentError, path: str, *, creating: bool
    ) -> StorageFailed | PromptFailed:
        """What a refused upload means: the end of the run, or of this one prompt."""
        where = f"s3://{self._bucket_name}/{path}"
        if exc.status == 403 and exc.code not in CREDENTIALS and not creating:
            return rejected(
                where,
                "an object is there already and this account may not compare or replace it; grant "
                "s3:GetObject, or delete the object",
            )
        every = exc.code in EVERY_OBJECT or exc.code.startswith("KMS.")
        if exc.status in {400, 413, 414, 422} and not every:
            return rejected(where, str(exc))
        return self._failed(exc)

    def _failed(self, exc: PermanentError) -> StorageFailed:
        url = self._url()
        if exc.status == 404:
            return StorageFailed(
                f"the bucket {self._bucket_name} does not exist; create it or check --output"
            )
        if exc.status == 401 or exc.code in CREDENTIALS:
            return StorageFailed(f"the credentials for {url} are not accepted ({exc.reason}); {LOG_IN}")
        if exc.status in {301, 307} or exc.code in REGION:
            return StorageFailed(
                f"{url} is in another region; name the right one by AWS_DEFAULT_REGION: {exc.reason}"
            )
        if exc.code == NO_ACLS:
            return StorageFailed(
                f"the bucket {self._bucket_name} allows no ACLs; leave --acl out, and let the bucket's "
                "policy say who may read"
            )
        if exc.status == 403:
            return StorageFailed(f"this account may not write to {url}; {self._grants()}: {exc.reason}")
        return StorageFailed(f"the storage refuses {url}: {exc}")

    def _grants(self) -> str:
        """What to do where writing is forbidden."""
        if not self._options.acl:
            return "grant it s3:PutObject (and s3:GetObject, to compare and replace)"
        return "grant it s3:PutObject and s3:PutObjectAcl, and see whether Block Public Access forbids --acl"

    def _url(self) -> str:
        return f"s3://{self._bucket_name}/{self._prefix}"

    def _bucket(self) -> Bucket:
        from text2img.storage.s3_bucket import Bucket

        with self._lock:
            if self._opened is None:
                self._opened = Bucket(
                    self._bucket_name, self._options, self._patience, self._timeout, clock=self._clock
                )
            return self._opened


def is_bucket(name: str) -> bool:
    """By S3's rules for the names of general purpose buckets."""
    return bool(_BUCKET.fullmatch(name)) and ".." not in name and not _NUMBERS.fullmatch(name)
