"""Image storage in a bucket of Amazon S3 or a compatible service: ImageStorage's rules in S3's terms.

Only ``s3_bucket`` uses boto3. It is imported when the bucket is first needed.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
import time
from typing import TYPE_CHECKING, Final

from text2img.concurrency.timeouts import run_with_timeout
from text2img.errors import BucketMissing, ClaimLost, ConfigurationError, PromptFailed, StorageFailed
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
    from text2img.storage.s3_bucket import Bucket


LOGIN_HINT: Final = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, choose a profile with AWS_PROFILE, or run under a role"
)
ACLS_UNSUPPORTED: Final = "AccessControlListNotSupported"
CREDENTIAL_ERRORS: Final = frozenset(
    {
        *("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"),
        *("TokenRefreshRequired", "RequestTimeTooSkewed", "InvalidSecurity", "NotSignedUp", "AccountProblem"),
    }
)
REGION_ERRORS: Final = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
)
BUCKET_ERRORS: Final = (
    CREDENTIAL_ERRORS
    | REGION_ERRORS
    | {ACLS_UNSUPPORTED, "InvalidRequest", "InvalidBucketName", "MalformedACLError"}
)
"""A 400 with one of these codes applies to every object; with another code, only to the uploaded one."""
TRANSIENT_ERRORS: Final = frozenset(
    {
        *("RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "SlowDown"),
        *("ConditionalRequestConflict", "OperationAborted", "ThrottlingException", "TooManyRequests"),
    }
)
"""Codes of transient errors whose status alone would make them permanent."""

log = logging.getLogger(__name__)

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_IP_ADDRESS = re.compile(r"\d+\.\d+\.\d+\.\d+")  # not allowed as a bucket's name
_BUCKET_HOST = re.compile(  # hosts of services that also take the bucket's name before them
    r"s3[.-].+|storage\.googleapis\.com|[\w-]+\.(digitaloceanspaces|linodeobjects|vultrobjects)\.com"
    r"|[0-9a-f]{32}\.([a-z]+\.)?r2\.cloudflarestorage\.com"
)
_ENDPOINT = re.compile(r"https?://[^\s/@?#]+(/[^\s@?#]*)?")


def check_environment(endpoint: str | None) -> None:
    """Raise ConfigurationError for variables that boto3 could not use; ``endpoint`` overrides some."""
    if endpoint is None:
        check_url_variables("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    check_certificate_variables("AWS_CA_BUNDLE")


def endpoint_of(given: str | None) -> tuple[str, str]:
    """Return the setting that names the service, and its URL; ``given`` is the option's value."""
    settings = {
        "--s3-endpoint (S3_ENDPOINT)": given,
        **{name: os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")},
    }
    return next(((name, url) for name, url in settings.items() if url), ("AWS_ENDPOINT_URL", ""))


def _check_endpoint(setting: str, url: str, bucket: str) -> None:
    """Raise ConfigurationError if the service's URL names the bucket as well, in its path or before its host.

    A host such as minio.example.com is left alone: the bucket may be called minio, too.
    """
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    inside = f"{bucket}." if _BUCKET_HOST.fullmatch(host.removeprefix(f"{bucket}.")) else ""
    if (inside and host.startswith(inside)) or path.strip("/").split("/")[0] == bucket:
        raise ConfigurationError(
            f"{setting} contains the bucket {bucket}, which the output names already; write"
            f" {scheme}://{host.removeprefix(inside)}"
        )


class S3Storage:
    """An ImageStorage over ``s3://bucket/prefix`` (the prefix may be empty).

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
        self._bucket_name, self._prefix = parse(url, "s3", is_bucket)
        self._options = options or StorageOptions()
        endpoint = self._options.s3_endpoint
        if endpoint is not None and not _ENDPOINT.fullmatch(endpoint):
            raise ConfigurationError(
                "--s3-endpoint must be a URL like https://s3.example.com, without a user or a query"
            )
        check_environment(endpoint)
        self._endpoint = endpoint_of(endpoint)
        _check_endpoint(*self._endpoint, self._bucket_name)
        self._retry_timeout = retry_timeout
        self._timeout = timeout
        self._clock = clock
        self._lock = threading.Lock()
        self._opened: Bucket | None = None
        self._conditional = True

    def check(self) -> None:
        """Check that the bucket exists; see ImageStorage.check."""
        try:
            with endpoint_checked(*self._endpoint):
                run_with_timeout(19, lambda: self._bucket().check_bucket(retry_timeout=8))
        except TimeoutError as exc:
            raise StorageFailed(f"{self._url()} does not answer; check the network and --output") from exc
        except PermanentError as exc:
            if exc.status == 404:
                raise BucketMissing(str(self._storage_error(exc))) from exc
            # An account that may only write gets a 403.
            if exc.status != 403 or exc.code in CREDENTIAL_ERRORS:
                raise self._storage_error(exc) from exc

    def check_writable(self) -> None:
        """Store and delete a test object; see ImageStorage.check_writable.

        Needs s3:PutObject and s3:DeleteObject. Also tries to overwrite the object, which a service that
        honours conditional writes must reject.
        """
        name = f"doctor-{secrets.token_hex(8)}.txt"
        try:
            with endpoint_checked(*self._endpoint):
                self.put(name, b"text2img doctor", "text/plain", lambda: True)
            safe = self._refuses_overwrite(name)
            self._bucket().delete(self._prefix + name)
        except PermanentError as exc:
            raise StorageFailed(
                f"{self._url()}{name} was stored but not deleted ({exc}); grant s3:DeleteObject"
            ) from exc
        except PromptFailed as exc:
            raise StorageFailed(str(exc)) from exc
        if not safe:
            raise StorageFailed(
                f"{self._url()} ignores If-None-Match, so a late worker could overwrite another's "
                "image; use a service that honours it"
            )

    def put(
        self,
        name: str,
        data: bytes,
        content_type: str,
        may_replace: Callable[[], bool],
        classify: Classify = classify_as_ours,
    ) -> str:
        """Store the object; see ImageStorage.put.

        It is created with ``If-None-Match: *`` and replaced with ``If-Match`` and the ETag. An account that
        may not read an existing object cannot compare it. While the claim holds, it replaces any object; if
        it may not replace it either, the object is rejected. Without conditional writes in the service, every
        object is stored under these rules.
        """
        path = self._prefix + check_name(name)
        target = Target(
            upload=lambda version: self._upload(path, data, content_type, version),
            lookup=lambda: self._lookup(path),
            read=lambda version: self._bucket().read(path, version, 0, MAX_OBJECT_BYTES + 1),
        )
        create_or_replace(self._url() + name, data, target, may_replace, classify)
        return self._bucket().public_url(path) if self._options.public_urls else self._url() + name

    def read(self, url: str) -> bytes:
        """Return the object's content; needs s3:GetObject. See ImageStorage.read."""
        public = self._bucket().public_url(self._prefix)
        name = object_name({self._url(): identity, public: percent_decode}, url)
        return read_whole(self._bucket(), self._prefix + name, self._url() + name)

    def _upload(self, path: str, data: bytes, content_type: str, version: str | None) -> bool:
        """Replace the object of that ETag (None: any); return False if it has another ETag."""
        if not self._conditional:
            if version == ABSENT:
                return False
            version = None
        try:
            self._bucket().upload(path, data, content_type, version)
        except PermanentError as exc:
            if version is not None and exc.status == 501:
                self._disable_conditional_writes()
                return False
            vanished = exc.status == 404 and exc.code != "NoSuchBucket" and bool(version)
            if version is not None and (exc.status == 412 or vanished):
                return False
            raise self._upload_error(exc, path, creating=version == ABSENT) from exc
        return True

    def _lookup(self, path: str) -> ObjectInfo | None:
        """Return the stored object, None if there is none, or UNKNOWN if this account may not read it.

        Without conditional writes no object can be created safely, so an absent one is UNKNOWN too. Then only
        the claim's holder may write.
        """
        from text2img.storage.s3_bucket import UNKNOWN

        try:
            return self._bucket().lookup(path)
        except PermanentError as exc:
            if exc.status == 404:
                return None if self._conditional else UNKNOWN
            if exc.status == 403:
                return UNKNOWN
            raise self._storage_error(exc) from exc

    def _disable_conditional_writes(self) -> None:
        with self._lock:
            if self._conditional:
                log.warning(
                    "%s has no conditional writes (501); images are written while their claim holds",
                    self._url(),
                )
            self._conditional = False

    def _refuses_overwrite(self, name: str) -> bool:
        """Return True if the service protects an existing object from a writer without a claim."""
        try:
            self.put(name, b"text2img doctor, too late", "text/plain", lambda: False)
        except ClaimLost:
            return True
        return False

    def _upload_error(
        self, exc: PermanentError, path: str, *, creating: bool
    ) -> StorageFailed | PromptFailed:
        """Return the error of a failed upload: StorageFailed ends the run, PromptFailed this prompt."""
        url = f"s3://{self._bucket_name}/{path}"
        if exc.status == 403 and exc.code not in CREDENTIAL_ERRORS and not creating:
            return rejected(
                url,
                "an object exists already and this account may not compare or replace it; grant "
                "s3:GetObject, or delete the object",
            )
        every_object = exc.code in BUCKET_ERRORS or exc.code.startswith("KMS.")
        if exc.status in {400, 413, 414, 422} and not every_object:
            return rejected(url, str(exc))
        return self._storage_error(exc)

    def _storage_error(self, exc: PermanentError) -> StorageFailed:
        url = self._url()
        if exc.status == 404:
            return StorageFailed(
                f"the bucket {self._bucket_name} does not exist; create it or check --output"
            )
        if exc.status == 401 or exc.code in CREDENTIAL_ERRORS:
            return StorageFailed(f"the credentials for {url} are rejected ({exc.reason}); {LOGIN_HINT}")
        if exc.status in {301, 307} or exc.code in REGION_ERRORS:
            return StorageFailed(f"{url} is in another region; set AWS_DEFAULT_REGION to it: {exc.reason}")
        if exc.code == ACLS_UNSUPPORTED:
            return StorageFailed(
                f"the bucket {self._bucket_name} allows no ACLs; omit --acl and grant read access in the "
                "bucket's policy"
            )
        if exc.status == 403:
            return StorageFailed(f"this account may not write to {url}; {self._grant_hint()}: {exc.reason}")
        return StorageFailed(f"the storage rejects {url}: {exc}")

    def _grant_hint(self) -> str:
        """Return the hint for a forbidden write."""
        if not self._options.acl:
            return "grant it s3:PutObject (and s3:GetObject, to compare and replace)"
        return "grant it s3:PutObject and s3:PutObjectAcl; check whether Block Public Access forbids --acl"

    def _url(self) -> str:
        return f"s3://{self._bucket_name}/{self._prefix}"

    def _bucket(self) -> Bucket:
        from text2img.storage.s3_bucket import Bucket

        with self._lock:
            if self._opened is None:
                self._opened = Bucket(
                    self._bucket_name, self._options, self._retry_timeout, self._timeout, clock=self._clock
                )
            return self._opened


def is_bucket(name: str) -> bool:
    """Check a name by S3's rules for the names of general purpose buckets."""
    return bool(_BUCKET.fullmatch(name)) and ".." not in name and not _IP_ADDRESS.fullmatch(name)
