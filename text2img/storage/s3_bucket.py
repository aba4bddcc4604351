"""One bucket, by boto3: credentials, connections, tries, and its errors in our words.

Knows neither pictures nor claims. Imported when a bucket is first needed, since boto3 takes its time to
load. docs/s3.md says why it is boto3.
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
from botocore.config import Config
from botocore.loaders import create_loader
from botocore.parsers import ResponseParserError

from text2img import __version__
from text2img.errors import StorageFailed
from text2img.prompts.ids import quoted
from text2img.storage.bucket import ABSENT, ListEntry, PermanentError, TransientError, one_line, retry
from text2img.storage.s3_errors import LOG_IN, NO_ACLS, PASSING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from text2img.storage import StorageOptions
    from text2img.storage.bucket import Clock, Sum


_Result = TypeVar("_Result")
_CONNECTIONS = 128  # kept open at the most: more than any sensible --upload-workers
_FAULTS = (
    *(boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, ResponseParserError),
    *(ConnectionError, TimeoutError),
)
_LOGIN_FAULTS = (
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
    """An object as it is stored; its version is its ETag. ``read`` gets its bytes, None where it may not."""

    version: str | None
    size: int | None
    read: Callable[[], bytes | None]

    def holds(self, data: bytes) -> bool:
        """Whether the object's content is that.

        The ETag of an object that was stored whole is its MD5; encrypted by KMS or in parts it is not, and
        then the bytes themselves are compared.
        """
        if self.size != len(data):
            return False
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return (self.version or "").strip('"') == md5 or self.read() == data


UNSEEN = ObjectInfo(version=None, size=None, read=lambda: None)


class Bucket:
    """A bucket by name. Every method raises Refused for an answer that stays, StorageFailed for all else.

    ``patience`` and ``timeout`` in seconds and ``clock`` as S3Storage's. Where it is, in which region, and
    who we are is found by boto3's own rules (environment, ``~/.aws``, the machine's role), unless an endpoint
    is given.
    """

    def __init__(
        self, name: str, options: StorageOptions, patience: float, timeout: float, *, clock: Clock = time
    ) -> None:
        self._name = name
        self._acl = options.acl
        self._patience = patience
        self._persistently = partial(retry, sleep=clock.sleep, clock=clock.monotonic)
        self._client = _client(options.s3_endpoint, timeout)

    def look_at_bucket(self, patience: float) -> None:
        """Ask whether it is there, for that many seconds at the most."""
        try:
            self._ask(partial(self._client.head_bucket, Bucket=self._name), patience)
        except PermanentError as exc:
            if exc.status not in {400, 403}:
                raise
            # HEAD has no words: whether it is the credentials or the account's rights, a listing tells.
            self._ask(partial(self._client.list_objects_v2, Bucket=self._name, MaxKeys=1), patience)
        if self._acl and self._takes_no_acls(patience):
            raise PermanentError(400, "its object ownership is BucketOwnerEnforced", NO_ACLS)

    def objects(self, prefix: str, most: int) -> list[ListEntry]:
        """The objects whose names begin so, ``most`` of them at the most; needs s3:ListBucket."""

        def attempt() -> list[ListEntry]:
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._name, Prefix=prefix, PaginationConfig={"MaxItems": most}
            )
            found = (each for page in pages for each in page.get("Contents", ()))
            return [ListEntry(each["Key"], each["Size"], each["ETag"], each["ETag"]) for each in found]

        return self._ask(attempt)

    def sum(self, listed: ListEntry) -> tuple[Sum, bytes] | None:
        """A sum of the whole object where S3 has one, else the ETag where it is made of MD5s."""
        head = partial(self._client.head_object, Bucket=self._name, Key=listed.path)
        found = whole(self._ask(partial(head, ChecksumMode="ENABLED")), listed.version)
        if found or "-" not in listed.version:
            return found
        return of_parts(self._ask(partial(head, PartNumber=1)), listed.version, listed.size)

    def look(self, path: str) -> ObjectInfo:
        """The object as it is stored."""
        found = self._ask(partial(self._client.head_object, Bucket=self._name, Key=path))
        etag = found.get("ETag")
        return ObjectInfo(etag, found.get("ContentLength"), partial(self._read, path, etag))

    def read(self, path: str, version: str | None, start: int, end: int) -> bytes:
        """The object's bytes from ``start`` to before ``end``, while it has that ETag."""
        wanted = {"Bucket": self._name, "Key": path, "Range": f"bytes={start}-{end - 1}"}
        wanted |= {"IfMatch": version} if version else {}

        def attempt() -> bytes:
            body = self._client.get_object(**wanted)["Body"]
            with body:  # not `as`, which gives urllib3's answer, and with it urllib3's errors
                return bytes(body.read())

        return self._ask(attempt)

    def upload(self, path: str, data: bytes, content_type: str, version: str | None) -> None:
        """Store the object over that ETag (ABSENT: where there is none, None: anyhow).

        Carries an MD5 that the server compares: every service knows it, unlike boto3's newer checksums. May
        be repeated: what came through although its answer was lost is found as 412 the next time.
        """
        md5 = hashlib.md5(data, usedforsecurity=False).digest()
        wanted = {"Bucket": self._name, "Key": path, "Body": data, "ContentType": content_type}
        wanted["ContentMD5"] = base64.b64encode(md5).decode("ascii")
        if self._acl:
            wanted["ACL"] = self._acl
        if version == ABSENT:
            wanted["IfNoneMatch"] = "*"
        elif version is not None:
            wanted["IfMatch"] = version
        self._ask(partial(self._client.put_object, **wanted))

    def delete(self, path: str) -> None:
        """Remove the object; one that is gone already is no error."""
        self._ask(partial(self._client.delete_object, Bucket=self._name, Key=path))

    def public_url(self, path: str) -> str:
        """Where anybody finds the object, provided that they may read it.

        On Amazon's S3 the bucket's own host, in whatever region it is. A host that would have a dot too many
        for its certificate, and any other service: as boto3 addresses the bucket.
        """
        endpoint = urlsplit(self._client.meta.endpoint_url)
        host = endpoint.netloc.rpartition("@")[2]
        if host.endswith(".amazonaws.com") and "." not in self._name:
            return f"https://{self._name}.s3.amazonaws.com/{quoted(path)}"
        base = f"{endpoint.path.rstrip('/')}/"
        if (self._client.meta.config.s3 or {}).get("addressing_style") == "virtual":
            return f"{endpoint.scheme}://{self._name}.{host}{base}{quoted(path)}"
        return f"{endpoint.scheme}://{host}{base}{self._name}/{quoted(path)}"

    def _takes_no_acls(self, patience: float) -> bool:
        """Whether it is known to refuse ACLs, as Amazon's buckets do unless they are made otherwise."""
        try:
            found = self._ask(
                partial(self._client.get_bucket_ownership_controls, Bucket=self._name), patience
            )
        except PermanentError:  # many accounts may not ask, and many services do not know
            return False
        rules = found.get("OwnershipControls", {}).get("Rules", [])
        enforced = any(rule.get("ObjectOwnership") == "BucketOwnerEnforced" for rule in rules)
        return enforced and self._acl != "bucket-owner-full-control"  # which says what is so anyway

    def _read(self, path: str, etag: str | None) -> bytes | None:
        """The object's bytes while it has that ETag; None where it has changed or may not be read."""
        unchanged = {"IfMatch": etag} if etag else {}

        def attempt() -> bytes:
            body = self._client.get_object(Bucket=self._name, Key=path, **unchanged)["Body"]
            with body:
                return bytes(body.read())

        try:
            return self._ask(attempt)
        except PermanentError:
            return None

    def _ask(self, attempt: Callable[[], _Result], patience: float | None = None) -> _Result:
        """Try for that long (by default the bucket's patience). boto3 keeps the time of a single try."""
        patience = self._patience if patience is None else patience
        return self._persistently(lambda _: _translated(attempt), patience, 0)


def _client(endpoint: str | None, timeout: float) -> Any:
    config = Config(
        connect_timeout=min(timeout, 10),
        read_timeout=timeout,
        retries={"total_max_attempts": 1},  # tries are counted here, by the clock
        max_pool_connections=_CONNECTIONS,
        request_checksum_calculation="when_required",  # several services know no trailing checksums
        response_checksum_validation="when_required",
        user_agent_extra=f"text2img/{__version__}",
    )
    return _translated(lambda: _session().client("s3", endpoint_url=endpoint, config=config))


def _session() -> Any:
    own = botocore.session.Session()
    session = boto3.session.Session(botocore_session=own)
    own.register_component("data_loader", _loader(own.get_config_variable("data_path")))
    return session


@cache
def _loader(data_path: str | None) -> Any:
    """AWS's descriptions of its services, read once: that is most of what a client costs."""
    return create_loader(data_path)


def _translated(attempt: Callable[[], _Result]) -> _Result:
    """What the attempt returns; boto3's errors in our words."""
    try:
        return attempt()
    except boto.ClientError as exc:
        raise _answered(exc) from exc
    except _FAULTS as exc:
        raise TransientError(f"S3 cannot be reached ({type(exc).__name__}); check the network") from exc
    except _LOGIN_FAULTS as exc:
        raise StorageFailed(f"there are no AWS credentials ({one_line(exc)}); {LOG_IN}") from exc
    except (boto.BotoCoreError, ValueError) as exc:
        raise StorageFailed(f"S3 cannot be used: {one_line(exc)}") from exc


def _answered(exc: boto.ClientError) -> PermanentError | StorageFailed:
    """An answer that stays, or one that may pass."""
    error, about = exc.response.get("Error", {}), exc.response.get("ResponseMetadata", {})
    status, code = int(about.get("HTTPStatusCode") or 0), str(error.get("Code") or "")
    reason = one_line(error.get("Message") or code)
    if exc.operation_name not in _OPERATIONS:  # it was asked for credentials, not S3 for anything
        return StorageFailed(f"AWS gives no credentials ({exc.operation_name}: {reason}); {LOG_IN}")
    if code in PASSING or status in {408, 429} or (status >= 500 and status != 501):
        return TransientError(f"S3 keeps answering {status} {code}: {reason}; run it again later")
    region = error.get("Region") or about.get("HTTPHeaders", {}).get("x-amz-bucket-region")
    return PermanentError(status, f"{reason} (it is in {region})" if region else reason, code)


_ETAG: Final = re.compile(r'"?([0-9a-f]{32})(?:-(\d+))?"?')


class _Crc32:
    """zlib's CRC-32 in the form of hashlib's sums."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


class _OfParts:
    """The MD5 of the MD5s of parts of ``size`` bytes each, the last one excepted."""

    def __init__(self, size: int) -> None:
        self._size, self._left, self._part, self._done = size, size, _md5(), b""

    def update(self, data: bytes, /) -> None:
        while data:
            piece, data = data[: self._left], data[self._left :]
            self._part.update(piece)
            self._left -= len(piece)
            if not self._left:
                self._close()

    def digest(self) -> bytes:
        if self._left < self._size:
            self._close()
        return hashlib.md5(self._done, usedforsecurity=False).digest()

    def _close(self) -> None:
        self._done += self._part.digest()
        self._left, self._part = self._size, _md5()


def whole(head: Mapping[str, Any], etag: str) -> tuple[Sum, bytes] | None:
    """The sum of the object of that ETag and answer to HEAD, and what it comes to; None where it has none.

    Of an object in parts only what is said to be of the whole: services differ in what else they tell.
    """
    in_parts = "-" in etag
    if head.get("ChecksumType", "COMPOSITE" if in_parts else "FULL_OBJECT") == "FULL_OBJECT":
        for name, kind in (("SHA256", hashlib.sha256), ("SHA1", _sha1), ("CRC32", _Crc32)):
            if told := head.get(f"Checksum{name}"):
                return kind(), base64.b64decode(told)
    md5 = None if in_parts else _md5_in(head, etag)
    return (_md5(), bytes.fromhex(md5[1])) if md5 else None


def of_parts(head: Mapping[str, Any], etag: str, size: int) -> tuple[Sum, bytes] | None:
    """The same of an object in parts, of so many bytes; the answer is about its first part."""
    first, count = int(head.get("ContentLength") or 0), int(head.get("PartsCount") or 0)
    md5 = _md5_in(head, etag)
    if not (md5 and md5[2] and count == int(md5[2]) and (count - 1) * first < size <= count * first):
        return None
    return _OfParts(first), bytes.fromhex(md5[1])


def _md5_in(head: Mapping[str, Any], etag: str) -> re.Match[str] | None:
    """The MD5 in the ETag, and the number of parts, where it is made of MD5s."""
    sealed = "kms" in str(head.get("ServerSideEncryption") or "") or head.get("SSECustomerAlgorithm")
    return None if sealed else _ETAG.fullmatch(etag)


def _md5() -> Any:
    return hashlib.md5(usedforsecurity=False)


def _sha1() -> Any:
    return hashlib.sha1(usedforsecurity=False)
