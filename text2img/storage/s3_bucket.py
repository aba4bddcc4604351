"""One bucket through boto3: credentials, connections, retries, checksums, and its errors as ours.

Imported when a bucket is first needed, since boto3 loads slowly. docs/s3.md explains the choice of boto3.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
import zlib
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.exceptions as boto
import botocore.session
from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)
from botocore.config import Config
from botocore.loaders import create_loader
from botocore.parsers import ResponseParserError

from text2img import __version__
from text2img.concurrency.http_limits import LimitedConnection, LimitedPool, LimitedResponse, MinimumRate
from text2img.errors import StorageFailed
from text2img.prompts.ids import quoted
from text2img.settings import tls_fault
from text2img.storage.bucket import (
    ABSENT,
    EndpointFailed,
    ListEntry,
    PermanentError,
    TransientError,
    one_line,
    retry,
)
from text2img.storage.s3 import ACLS_UNSUPPORTED, LOGIN_HINT, TRANSIENT_ERRORS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from text2img.storage import StorageOptions
    from text2img.storage.bucket import Checksum, Clock


_Result = TypeVar("_Result")
_MAX_CONNECTIONS = 128  # kept open: more than any sensible --upload-workers
_NETWORK_ERRORS = (
    *(boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, ResponseParserError),
    *(ConnectionError, TimeoutError),
)
_CREDENTIAL_ERRORS = (
    *(boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError),
    *(boto.ProfileNotFound, boto.SSOError, boto.TokenRetrievalError, boto.MetadataRetrievalError),
)
_OPERATIONS = frozenset(
    {
        *("HeadBucket", "ListObjectsV2", "GetBucketOwnershipControls"),
        *("HeadObject", "GetObject", "PutObject", "DeleteObject"),
    }
)


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """A stored object; its version is its ETag.

    ``read`` returns its bytes, or None if it changed or this account may not read it.
    """

    version: str | None
    size: int | None
    read: Callable[[], bytes | None]

    def holds(self, data: bytes) -> bool:
        """Return True if the object's content is ``data``.

        The ETag of an object stored in one part is its MD5. If it was stored in several parts or encrypted by
        KMS, it is not, and the bytes themselves are compared.
        """
        if self.size != len(data):
            return False
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return (self.version or "").strip('"') == md5 or self.read() == data


UNKNOWN = ObjectInfo(version=None, size=None, read=lambda: None)


class Bucket:
    """A bucket by name.

    Every method raises PermanentError for a rejection that a retry would not change, and StorageFailed for
    every other failure. ``retry_timeout``, ``timeout`` (both in seconds) and ``clock`` are S3Storage's.
    boto3's own rules (environment, ``~/.aws``, the machine's role) determine the credentials, the region and,
    unless the options name one, the endpoint.
    """

    def __init__(
        self, name: str, options: StorageOptions, retry_timeout: float, timeout: float, *, clock: Clock = time
    ) -> None:
        self._name = name
        self._acl = options.acl
        self._retry_timeout = retry_timeout
        self._retry = partial(retry, sleep=clock.sleep, clock=clock.monotonic)
        self._client = _client(options.s3_endpoint, timeout)

    def check_bucket(self, retry_timeout: float) -> None:
        """Check that the bucket exists, for at most ``retry_timeout`` seconds."""
        try:
            self._with_retries(partial(self._client.head_bucket, Bucket=self._name), retry_timeout)
        except PermanentError as exc:
            if exc.status not in {400, 403}:
                raise
            # The response to HEAD has no body; a listing shows whether the credentials or the rights fail.
            listing = partial(self._client.list_objects_v2, Bucket=self._name, MaxKeys=1)
            self._with_retries(listing, retry_timeout)
        if self._acl and self._disallows_acls(retry_timeout):
            raise PermanentError(400, "its object ownership is BucketOwnerEnforced", ACLS_UNSUPPORTED)

    def objects(self, prefix: str, max_count: int) -> list[ListEntry]:
        """List at most ``max_count`` objects whose names start with ``prefix``; needs s3:ListBucket."""

        def attempt() -> list[ListEntry]:
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._name, Prefix=prefix, PaginationConfig={"MaxItems": max_count}
            )
            found = (item for page in pages for item in page.get("Contents", ()))
            return [ListEntry(item["Key"], item["Size"], item["ETag"], item["ETag"]) for item in found]

        return self._with_retries(attempt)

    def checksum(self, listed: ListEntry) -> tuple[Checksum, bytes] | None:
        """Return S3's checksum of the whole object or else, if it consists of MD5s, the ETag."""
        head = partial(self._client.head_object, Bucket=self._name, Key=listed.path)
        found = full_checksum(self._with_retries(partial(head, ChecksumMode="ENABLED")), listed.version)
        if found or "-" not in listed.version:
            return found
        first_part = self._with_retries(partial(head, PartNumber=1))
        return multipart_checksum(first_part, listed.version, listed.size)

    def lookup(self, path: str) -> ObjectInfo:
        """Return the object's metadata."""
        head = self._with_retries(partial(self._client.head_object, Bucket=self._name, Key=path))
        etag = head.get("ETag")
        return ObjectInfo(etag, head.get("ContentLength"), partial(self._read, path, etag))

    def read(self, path: str, version: str | None, start: int, end: int) -> bytes:
        """Return the bytes from ``start`` to before ``end``, while the object has that ETag."""
        request = {"Bucket": self._name, "Key": path, "Range": f"bytes={start}-{end - 1}"}
        request |= {"IfMatch": version} if version else {}

        def attempt() -> bytes:
            body = self._client.get_object(**request)["Body"]
            with body:  # not `as`: that gives urllib3's response, which raises urllib3's errors
                return bytes(body.read())

        return self._with_retries(attempt)

    def upload(self, path: str, data: bytes, content_type: str, version: str | None) -> None:
        """Replace the object of that ETag (ABSENT: only create; None: replace any).

        The request carries an MD5 that the server verifies: every service supports it, unlike boto3's newer
        checksums. Repeating it is safe: if an upload succeeded but its response was lost, the next one gets a
        412.
        """
        md5 = hashlib.md5(data, usedforsecurity=False).digest()
        request = {"Bucket": self._name, "Key": path, "Body": data, "ContentType": content_type}
        request["ContentMD5"] = base64.b64encode(md5).decode("ascii")
        if self._acl:
            request["ACL"] = self._acl
        if version == ABSENT:
            request["IfNoneMatch"] = "*"
        elif version is not None:
            request["IfMatch"] = version
        self._with_retries(partial(self._client.put_object, **request))

    def delete(self, path: str) -> None:
        """Delete the object, if it exists."""
        self._with_retries(partial(self._client.delete_object, Bucket=self._name, Key=path))

    def public_url(self, path: str) -> str:
        """Return the object's public URL, which works if the object may be read by everyone.

        On Amazon's S3 the host is the bucket's own, in every region. For a bucket whose name has a dot, which
        the certificate does not cover, and for other services, it is the host that boto3 uses.
        """
        endpoint = urlsplit(self._client.meta.endpoint_url)
        host = endpoint.netloc.rpartition("@")[2]
        if host.endswith(".amazonaws.com") and "." not in self._name:
            return f"https://{self._name}.s3.amazonaws.com/{quoted(path)}"
        base = f"{endpoint.path.rstrip('/')}/"
        if (self._client.meta.config.s3 or {}).get("addressing_style") == "virtual":
            return f"{endpoint.scheme}://{self._name}.{host}{base}{quoted(path)}"
        return f"{endpoint.scheme}://{host}{base}{self._name}/{quoted(path)}"

    def _disallows_acls(self, retry_timeout: float) -> bool:
        """Return True if the bucket is known to disallow ACLs, the default of Amazon's buckets."""
        try:
            request = partial(self._client.get_bucket_ownership_controls, Bucket=self._name)
            response = self._with_retries(request, retry_timeout)
        except PermanentError:  # many accounts may not request this, and many services do not support it
            return False
        rules = response.get("OwnershipControls", {}).get("Rules", [])
        enforced = any(rule.get("ObjectOwnership") == "BucketOwnerEnforced" for rule in rules)
        return enforced and self._acl != "bucket-owner-full-control"  # which such buckets allow

    def _read(self, path: str, etag: str | None) -> bytes | None:
        """Return the bytes of the object of that ETag; None if it has changed or may not be read."""
        unchanged = {"IfMatch": etag} if etag else {}

        def attempt() -> bytes:
            body = self._client.get_object(Bucket=self._name, Key=path, **unchanged)["Body"]
            with body:
                return bytes(body.read())

        try:
            return self._with_retries(attempt)
        except PermanentError:
            return None

    def _with_retries(self, attempt: Callable[[], _Result], retry_timeout: float | None = None) -> _Result:
        """Retry for that long, by default the bucket's retry timeout; boto3 times a single attempt."""
        retry_timeout = self._retry_timeout if retry_timeout is None else retry_timeout
        return self._retry(lambda _: _translate_errors(attempt), retry_timeout, 0)


def _client(endpoint: str | None, timeout: float) -> Any:
    config = Config(
        connect_timeout=min(timeout, 10),
        read_timeout=timeout,
        retries={"total_max_attempts": 1},  # the retries are ours, by the clock
        max_pool_connections=_MAX_CONNECTIONS,
        request_checksum_calculation="when_required",  # several services do not support trailing checksums
        response_checksum_validation="when_required",
        user_agent_extra=f"text2img/{__version__}",
    )
    client = _translate_errors(lambda: _session().client("s3", endpoint_url=endpoint, config=config))
    limit = MinimumRate()
    # boto3 has no option for it. The same dictionary serves its pools with and without a proxy.
    client._endpoint.http_session._pool_classes_by_scheme.update(  # noqa: SLF001
        http=partial(_HTTPPool, limit=limit), https=partial(_HTTPSPool, limit=limit)
    )
    return client


class _HTTP(LimitedConnection, AWSHTTPConnection):  # type: ignore[misc]
    response_class = LimitedResponse


class _HTTPS(LimitedConnection, AWSHTTPSConnection):  # type: ignore[misc]
    response_class = LimitedResponse


class _HTTPPool(LimitedPool, AWSHTTPConnectionPool):  # type: ignore[misc]
    ConnectionCls = _HTTP


class _HTTPSPool(LimitedPool, AWSHTTPSConnectionPool):  # type: ignore[misc]
    ConnectionCls = _HTTPS


def _session() -> Any:
    core = botocore.session.Session()
    session = boto3.session.Session(botocore_session=core)
    core.register_component("data_loader", _loader(core.get_config_variable("data_path")))
    return session


@cache
def _loader(data_path: str | None) -> Any:
    """Return the loader of AWS's service descriptions; reading them is most of a client's cost."""
    return create_loader(data_path)


def _translate_errors(attempt: Callable[[], _Result]) -> _Result:
    """Return the attempt's result; raise boto3's errors as ours."""
    try:
        return attempt()
    except boto.ClientError as exc:
        raise _to_storage_error(exc) from exc
    except _NETWORK_ERRORS as exc:
        if fault := tls_fault(exc, "AWS_CA_BUNDLE"):
            raise EndpointFailed(fault) from exc
        raise TransientError(f"S3 cannot be reached ({type(exc).__name__}); check the network") from exc
    except _CREDENTIAL_ERRORS as exc:
        raise StorageFailed(f"there are no AWS credentials ({one_line(exc)}); {LOGIN_HINT}") from exc
    except (boto.BotoCoreError, ValueError) as exc:
        if fault := tls_fault(exc, "AWS_CA_BUNDLE"):
            raise EndpointFailed(fault) from exc
        raise StorageFailed(f"S3 cannot be used: {one_line(exc)}") from exc


def _to_storage_error(exc: boto.ClientError) -> PermanentError | StorageFailed:
    """Return a PermanentError, or a TransientError for a response that a retry may change."""
    error, metadata = exc.response.get("Error", {}), exc.response.get("ResponseMetadata", {})
    status, code = int(metadata.get("HTTPStatusCode") or 0), str(error.get("Code") or "")
    reason = one_line(error.get("Message") or code)
    if exc.operation_name not in _OPERATIONS:  # a request for credentials failed, not one to S3
        return StorageFailed(f"AWS gives no credentials ({exc.operation_name}: {reason}); {LOGIN_HINT}")
    if code in TRANSIENT_ERRORS or status in {408, 429} or (status >= 500 and status != 501):
        return TransientError(f"S3 keeps answering {status} {code}: {reason}; run it again later")
    region = error.get("Region") or metadata.get("HTTPHeaders", {}).get("x-amz-bucket-region")
    return PermanentError(status, f"{reason} (it is in {region})" if region else reason, code)


_ETAG: Final = re.compile(r'"?([0-9a-f]{32})(?:-(\d+))?"?')


class _Crc32:
    """zlib's CRC-32 with the interface of hashlib's checksums."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


class _MultipartMd5:
    """The MD5 of the parts' MD5s; each part but the last has ``size`` bytes."""

    def __init__(self, size: int) -> None:
        self._size, self._left, self._part, self._digests = size, size, _md5(), b""

    def update(self, data: bytes, /) -> None:
        while data:
            piece, data = data[: self._left], data[self._left :]
            self._part.update(piece)
            self._left -= len(piece)
            if not self._left:
                self._end_part()

    def digest(self) -> bytes:
        if self._left < self._size:
            self._end_part()
        return hashlib.md5(self._digests, usedforsecurity=False).digest()

    def _end_part(self) -> None:
        self._digests += self._part.digest()
        self._left, self._part = self._size, _md5()


def full_checksum(head: Mapping[str, Any], etag: str) -> tuple[Checksum, bytes] | None:
    """Return an empty checksum and the digest of the object with that HEAD response and ETag, or None.

    For an object in parts, only a checksum marked as one of the full object counts: services differ in what
    the others cover.
    """
    in_parts = "-" in etag
    if head.get("ChecksumType", "COMPOSITE" if in_parts else "FULL_OBJECT") == "FULL_OBJECT":
        for name, algorithm in (("SHA256", hashlib.sha256), ("SHA1", _sha1), ("CRC32", _Crc32)):
            if digest := head.get(f"Checksum{name}"):
                return algorithm(), base64.b64decode(digest)
    md5 = None if in_parts else _md5_in(head, etag)
    return (_md5(), bytes.fromhex(md5[1])) if md5 else None


def multipart_checksum(head: Mapping[str, Any], etag: str, size: int) -> tuple[Checksum, bytes] | None:
    """Return the checksum and digest of an object of ``size`` bytes, stored in parts, or None.

    ``head`` is the response for its first part.
    """
    first, count = int(head.get("ContentLength") or 0), int(head.get("PartsCount") or 0)
    md5 = _md5_in(head, etag)
    if not (md5 and md5[2] and count == int(md5[2]) and (count - 1) * first < size <= count * first):
        return None
    return _MultipartMd5(first), bytes.fromhex(md5[1])


def _md5_in(head: Mapping[str, Any], etag: str) -> re.Match[str] | None:
    """Match the MD5 in the ETag and the number of parts; None if the ETag does not consist of MD5s."""
    encrypted = "kms" in str(head.get("ServerSideEncryption") or "") or head.get("SSECustomerAlgorithm")
    return None if encrypted else _ETAG.fullmatch(etag)


def _md5() -> Any:
    return hashlib.md5(usedforsecurity=False)


def _sha1() -> Any:
    return hashlib.sha1(usedforsecurity=False)
