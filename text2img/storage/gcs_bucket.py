"""One bucket through Google's client: credentials, connections, retries, and its errors as ours.

Imported when a bucket is first needed, since Google's library takes a second to load.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import google.auth
import google.auth.transport.requests
import google_crc32c
import requests
import urllib3
from google.api_core.client_info import ClientInfo
from google.api_core.exceptions import GoogleAPICallError
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption

from text2img import __version__
from text2img.concurrency.http_limits import LimitedAdapter, MinimumRate
from text2img.concurrency.timeouts import run_with_timeout
from text2img.errors import StorageFailed
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

if TYPE_CHECKING:
    from collections.abc import Callable

    from text2img.storage.bucket import Checksum, Clock


_Result = TypeVar("_Result")
_MAX_CONNECTIONS = 128  # kept open: more than any sensible --upload-workers
_NETWORK_ERRORS = (  # all transient
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    urllib3.exceptions.HTTPError,
    ConnectionError,
    TimeoutError,
    DataCorruption,
    TransportError,
)
_CLIENT_ERRORS = (GoogleAPICallError, GoogleAuthError, requests.RequestException, ValueError)


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """A stored object; its version is its generation. Checksums are in base64."""

    version: str | None
    size: int | None = None
    md5: str | None = None
    crc32c: str | None = None

    def holds(self, data: bytes) -> bool:
        """Return True if the object's content is ``data``."""
        if self.size != len(data):
            return False
        if self.md5 is not None:
            return self.md5 == _base64(hashlib.md5(data, usedforsecurity=False).digest())
        # Composed objects have no MD5, every object has a CRC32C (big-endian).
        return self.crc32c == _base64(google_crc32c.value(data).to_bytes(4, "big"))


UNKNOWN = ObjectInfo(version=None)


class Bucket:
    """A bucket by name.

    Every method raises PermanentError for a 4xx that a retry would not change, and StorageFailed for every
    other failure. ``retry_timeout``, ``timeout`` (both in seconds) and ``clock`` are GcsStorage's. If
    STORAGE_EMULATOR_HOST is set, requests go to that server, without credentials.
    """

    def __init__(
        self, name: str, acl: str | None, retry_timeout: float, timeout: float, *, clock: Clock = time
    ) -> None:
        self._acl = acl
        self._retry_timeout = retry_timeout
        self._retry = partial(retry, sleep=clock.sleep, clock=clock.monotonic)
        self._timeout = timeout
        self._bucket = _client().bucket(name)

    def check_bucket(self, retry_timeout: float) -> None:
        """Request the bucket's metadata, for at most ``retry_timeout`` seconds."""
        self._with_retries(lambda limit: self._bucket.reload(timeout=limit, retry=None), retry_timeout)
        if self._acl and self._bucket.iam_configuration.uniform_bucket_level_access_enabled:
            raise PermanentError(400, "it has uniform bucket-level access")

    def objects(self, prefix: str, max_count: int) -> list[ListEntry]:
        """List at most ``max_count`` objects whose names start with ``prefix``.

        Needs storage.objects.list.
        """

        def attempt(limit: float) -> list[ListEntry]:
            blobs = self._bucket.list_blobs(prefix=prefix, max_results=max_count, timeout=limit, retry=None)
            return [ListEntry(b.name, int(b.size or 0), str(b.generation), str(b.crc32c)) for b in blobs]

        return self._with_retries(attempt, self._retry_timeout)

    def checksum(self, listed: ListEntry) -> tuple[Checksum, bytes] | None:
        """Return the CRC32C, which every object has (composed ones have no MD5)."""
        checksum: Checksum = google_crc32c.Checksum()  # type: ignore[no-untyped-call]
        return checksum, base64.b64decode(listed.checksum)

    def lookup(self, path: str) -> ObjectInfo:
        """Return the object's metadata."""
        blob = self._bucket.blob(path)
        self._with_retries(lambda limit: blob.reload(timeout=limit, retry=None), self._retry_timeout)
        return ObjectInfo(str(blob.generation), blob.size, blob.md5_hash, blob.crc32c)

    def read(self, path: str, version: str | None, start: int, end: int) -> bytes:
        """Return that generation's bytes from ``start`` to before ``end``."""
        blob, generation = self._bucket.blob(path), int(version) if version else None

        def attempt(limit: float) -> bytes:
            return bytes(
                blob.download_as_bytes(
                    start=start,
                    end=end - 1,
                    raw_download=True,
                    if_generation_match=generation,
                    timeout=limit,
                    retry=None,
                )
            )

        return self._with_retries(attempt, self._retry_timeout)

    def upload(self, path: str, data: bytes, content_type: str, version: str | None) -> None:
        """Replace that generation with the object (ABSENT: only create; None: replace any).

        The request carries a checksum that the server verifies. Repeating it is safe: if an upload succeeded
        but its response was lost, the next one gets a 412.
        """
        blob = self._bucket.blob(path)
        generation = 0 if version == ABSENT else version and int(version)

        def attempt(limit: float) -> None:
            blob.upload_from_string(
                data,
                content_type=content_type,
                predefined_acl=self._acl,
                if_generation_match=generation,
                checksum="auto",
                timeout=limit,
                retry=None,
            )

        self._with_retries(attempt, self._retry_timeout)

    def delete(self, path: str) -> None:
        """Delete the object, if it exists."""
        blob = self._bucket.blob(path)
        try:
            self._with_retries(lambda limit: blob.delete(timeout=limit, retry=None), self._retry_timeout)
        except PermanentError as exc:
            if exc.status != 404:
                raise

    def _with_retries(self, attempt: Callable[[float], _Result], retry_timeout: float) -> _Result:
        return self._retry(lambda limit: _translate_errors(attempt, limit), retry_timeout, self._timeout)


def _translate_errors(attempt: Callable[[float], _Result], limit: float) -> _Result:
    """Return the attempt's result; raise Google's errors as ours."""
    try:
        return attempt(limit)
    except (*_NETWORK_ERRORS, *_CLIENT_ERRORS) as exc:
        raise _to_storage_error(exc) from exc


def _client() -> Any:
    credentials = find_credentials()
    session = google.auth.transport.requests.AuthorizedSession(credentials)
    # A connection for each concurrent upload: urllib3 keeps 10 and warns about each one it discards.
    adapter = LimitedAdapter(MinimumRate(), pool_maxsize=_MAX_CONNECTIONS)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    # Otherwise the library also requests the bucket's metadata, for traces that are not collected, and
    # repeats that with every upload while it fails.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    agent = ClientInfo(user_agent=f"text2img/{__version__}")
    try:
        return storage.Client(project=None, credentials=credentials, client_info=agent, _http=session)
    except (ValueError, GoogleAuthError) as exc:
        raise StorageFailed(f"Cloud Storage cannot be used: {_one_line(exc)}") from exc


def _is_transient(exc: Exception) -> bool:
    """Return True if the same request may succeed a little later."""
    if isinstance(exc, GoogleAPICallError):
        status = int(exc.code or 0)
        # A checksum mismatch is a 400: the bytes changed in transit, and a retry may succeed.
        corrupted = status == 400 and "match calculated" in _reason(exc)
        return status in {408, 429} or status >= 500 or corrupted
    return isinstance(exc, _NETWORK_ERRORS) or bool(getattr(exc, "retryable", False))


def _to_storage_error(exc: Exception) -> PermanentError | StorageFailed:
    if not isinstance(exc, GoogleAPICallError) and (fault := tls_fault(exc, "REQUESTS_CA_BUNDLE")):
        return EndpointFailed(fault)
    kind = TransientError if _is_transient(exc) else StorageFailed
    if isinstance(exc, GoogleAPICallError):
        if 400 <= int(exc.code or 0) < 500 and kind is StorageFailed:
            return PermanentError(int(exc.code), _reason(exc))
        answer = f"{int(exc.code or 0)}: {_reason(exc)}"
        return kind(f"Cloud Storage keeps answering {answer}; run it again later")
    if isinstance(exc, GoogleAuthError) and not isinstance(exc, TransportError):
        return kind(f"Google rejects the credentials ({_one_line(exc)}); {LOGIN_HINT}")
    return kind(f"Cloud Storage cannot be reached ({type(exc).__name__}); check the network")


def _reason(exc: GoogleAPICallError) -> str:
    """Return the server's message, without the request's URL that the library puts before it."""
    try:
        return _one_line(exc.response.json()["error"]["message"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return type(exc).__name__


def _one_line(message: object) -> str:
    return one_line(message.args[0] if isinstance(message, Exception) and message.args else message)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


_SCOPES = ("https://www.googleapis.com/auth/devstorage.read_write",)
LOGIN_HINT = (
    "run `gcloud auth application-default login`, or mount a key and set GOOGLE_APPLICATION_CREDENTIALS"
    " to its path"
)


def find_credentials() -> Any:
    """Return the credentials that Google's libraries find within 10 seconds.

    Raises StorageFailed, which names what is missing.
    """
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return AnonymousCredentials()
    key = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if key:
        _check_key(key)
    try:
        # Outside Google Cloud the lookup ends at a metadata server that may never answer.
        return run_with_timeout(10, lambda: google.auth.default(scopes=_SCOPES)[0])
    except DefaultCredentialsError as exc:
        if key:
            raise StorageFailed(f"the key {key} cannot be used: {_one_line(exc)}") from exc
        raise StorageFailed(f"there are no Google credentials; {LOGIN_HINT}") from exc
    except (GoogleAuthError, TimeoutError, ValueError) as exc:
        raise StorageFailed(f"cannot get Google credentials ({_one_line(exc)}); {LOGIN_HINT}") from exc


def _check_key(path: str) -> None:
    """Raise StorageFailed, naming the cause, if that file is not a readable key."""
    named = f"GOOGLE_APPLICATION_CREDENTIALS names {path}, which"
    try:
        key = json.loads(Path(path).read_bytes())
    except FileNotFoundError as exc:
        raise StorageFailed(f"{named} does not exist; mount the key there or unset the variable") from exc
    except IsADirectoryError as exc:  # Docker creates a folder for a mount whose source is missing
        raise StorageFailed(f"{named} is a folder; check that the key existed when it was mounted") from exc
    except OSError as exc:
        raise StorageFailed(
            f"{named} user {os.geteuid()} cannot read ({exc.strerror}); make it readable, or run as its owner"
        ) from exc
    except ValueError as exc:
        raise StorageFailed(f"{named} is not JSON; mount the key file as Google issued it") from exc
    if not isinstance(key, dict) or "type" not in key:
        raise StorageFailed(
            f"{named} is JSON but not a key (it has no type); mount the key as Google issued it"
        )
