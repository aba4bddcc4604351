"""One bucket, by Google's client: credentials, connections, tries, and its errors in our words.

Knows neither pictures nor claims. Imported when a bucket is first needed, since Google's library takes a
second to load.
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
from text2img.concurrency.timeouts import run_with_timeout
from text2img.errors import StorageFailed
from text2img.storage.bucket import ABSENT, ListEntry, PermanentError, TransientError, one_line, retry

if TYPE_CHECKING:
    from collections.abc import Callable

    from text2img.storage.bucket import Clock, Sum


_Result = TypeVar("_Result")
_CONNECTIONS = 128  # kept open at the most: more than any sensible --upload-workers
_FAULTS = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    urllib3.exceptions.HTTPError,
    ConnectionError,
    TimeoutError,
    DataCorruption,
    TransportError,
)


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as it is stored; its version is its generation. Sums are base64."""

    version: str | None
    size: int | None = None
    md5: str | None = None
    crc32c: str | None = None

    def holds(self, data: bytes) -> bool:
        """Whether the object's content is that."""
        if self.size != len(data):
            return False
        if self.md5 is not None:
            return self.md5 == _base64(hashlib.md5(data, usedforsecurity=False).digest())
        # Composed objects have no MD5, every object has a CRC32C (big-endian).
        return self.crc32c == _base64(google_crc32c.value(data).to_bytes(4, "big"))


UNSEEN = ObjectInfo(version=None)


class Bucket:
    """A bucket by name. Every method raises Refused for a 4xx that stays, StorageFailed for all else.

    ``patience`` and ``timeout`` in seconds and ``clock`` as GcsStorage's. With STORAGE_EMULATOR_HOST set it
    talks to that server, without credentials.
    """

    def __init__(
        self, name: str, acl: str | None, patience: float, timeout: float, *, clock: Clock = time
    ) -> None:
        self._acl = acl
        self._patience = patience
        self._persistently = partial(retry, sleep=clock.sleep, clock=clock.monotonic)
        self._timeout = timeout
        self._bucket = _client().bucket(name)

    def look_at_bucket(self, patience: float) -> None:
        """Ask for the bucket's metadata, for that many seconds at the most."""
        self._persist(lambda limit: self._bucket.reload(timeout=limit, retry=None), patience)
        if self._acl and self._bucket.iam_configuration.uniform_bucket_level_access_enabled:
            raise PermanentError(400, "it has uniform bucket-level access")

    def objects(self, prefix: str, most: int) -> list[ListEntry]:
        """The objects whose names begin so, ``most`` of them at the most; needs storage.objects.list."""

        def attempt(limit: float) -> list[ListEntry]:
            blobs = self._bucket.list_blobs(prefix=prefix, max_results=most, timeout=limit, retry=None)
            return [ListEntry(b.name, int(b.size or 0), str(b.generation), str(b.crc32c)) for b in blobs]

        return self._persist(attempt, self._patience)

    def sum(self, listed: ListEntry) -> tuple[Sum, bytes] | None:
        """The CRC32C, which every object has (composed ones have no MD5)."""
        checksum: Sum = google_crc32c.Checksum()  # type: ignore[no-untyped-call]
        return checksum, base64.b64decode(listed.checksum)

    def look(self, path: str) -> ObjectInfo:
        """The object as it is stored."""
        blob = self._bucket.blob(path)
        self._persist(lambda limit: blob.reload(timeout=limit, retry=None), self._patience)
        return ObjectInfo(str(blob.generation), blob.size, blob.md5_hash, blob.crc32c)

    def read(self, path: str, version: str | None, start: int, end: int) -> bytes:
        """The object's bytes from ``start`` to before ``end``, of that generation."""
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

        return self._persist(attempt, self._patience)

    def upload(self, path: str, data: bytes, content_type: str, version: str | None) -> None:
        """Store the object over that generation (ABSENT: where there is none, None: anyhow).

        Carries a checksum that the server compares. May be repeated: what came through although its answer
        was lost is found as 412 the next time.
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

        self._persist(attempt, self._patience)

    def delete(self, path: str) -> None:
        """Remove the object; one that is gone already is no error."""
        blob = self._bucket.blob(path)
        try:
            self._persist(lambda limit: blob.delete(timeout=limit, retry=None), self._patience)
        except PermanentError as exc:
            if exc.status != 404:
                raise

    def _persist(self, attempt: Callable[[float], _Result], patience: float) -> _Result:
        return self._persistently(lambda limit: _translated(attempt, limit), patience, self._timeout)


def _translated(attempt: Callable[[float], _Result], limit: float) -> _Result:
    """What the attempt returns; Google's errors in our words."""
    try:
        return attempt(limit)
    except (*_FAULTS, GoogleAPICallError, GoogleAuthError, requests.RequestException, ValueError) as exc:
        raise _explained(exc) from exc


def _client() -> Any:
    credentials = find_credentials()
    session = google.auth.transport.requests.AuthorizedSession(credentials)
    # As many kept connections as uploads at once: urllib3 keeps 10 and warns of each it throws away.
    adapter = requests.adapters.HTTPAdapter(pool_maxsize=_CONNECTIONS)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    # Else the library asks for the bucket's metadata aside, for traces that nobody collects, and again with
    # every upload while that fails.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    agent = ClientInfo(user_agent=f"text2img/{__version__}")
    try:
        return storage.Client(project=None, credentials=credentials, client_info=agent, _http=session)
    except (ValueError, GoogleAuthError) as exc:
        raise StorageFailed(f"Cloud Storage cannot be used: {_one_line(exc)}") from exc


def _may_pass(exc: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(exc, GoogleAPICallError):
        status = int(exc.code or 0)
        # A sum that does not match is a 400: the bytes were changed on the way, which may go better again.
        changed = status == 400 and "match calculated" in _reason(exc)
        return status in {408, 429} or status >= 500 or changed
    return isinstance(exc, _FAULTS) or bool(getattr(exc, "retryable", False))


def _explained(exc: Exception) -> PermanentError | StorageFailed:
    kind = TransientError if _may_pass(exc) else StorageFailed
    if isinstance(exc, GoogleAPICallError):
        if 400 <= int(exc.code or 0) < 500 and kind is StorageFailed:
            return PermanentError(int(exc.code), _reason(exc))
        answer = f"{int(exc.code or 0)}: {_reason(exc)}"
        return kind(f"Cloud Storage keeps answering {answer}; run it again later")
    if isinstance(exc, GoogleAuthError) and not isinstance(exc, TransportError):
        return kind(f"Google does not accept the credentials ({_one_line(exc)}); {HOW_TO_LOG_IN}")
    return kind(f"Cloud Storage cannot be reached ({type(exc).__name__}); check the network")


def _reason(exc: GoogleAPICallError) -> str:
    """The server's own words, without the request's URL that the library puts before them."""
    try:
        return _one_line(exc.response.json()["error"]["message"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return type(exc).__name__


def _one_line(exc: object) -> str:
    return one_line(exc.args[0] if isinstance(exc, Exception) and exc.args else exc)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


_SCOPES = ("https://www.googleapis.com/auth/devstorage.read_write",)
HOW_TO_LOG_IN = (
    "run `gcloud auth application-default login`, or mount a key and name it by "
    "GOOGLE_APPLICATION_CREDENTIALS"
)


def find_credentials() -> Any:
    """What Google's libraries find, within 10 seconds; StorageFailed says what is missing."""
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return AnonymousCredentials()
    key = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if key:
        _check_key(key)
    try:
        # Away from Google's machines the lookup ends at a metadata server that may never answer.
        return run_with_timeout(10, lambda: google.auth.default(scopes=_SCOPES)[0])
    except DefaultCredentialsError as exc:
        if key:
            raise StorageFailed(f"the key {key} cannot be used: {_said(exc)}") from exc
        raise StorageFailed(f"there are no Google credentials; {HOW_TO_LOG_IN}") from exc
    except (GoogleAuthError, TimeoutError, ValueError) as exc:
        raise StorageFailed(f"Google credentials cannot be had ({_said(exc)}); {HOW_TO_LOG_IN}") from exc


def _check_key(path: str) -> None:
    """Raise StorageFailed, naming the cause, where that file is no key that can be read."""
    named = f"GOOGLE_APPLICATION_CREDENTIALS names {path}, which"
    try:
        key = json.loads(Path(path).read_bytes())
    except FileNotFoundError as exc:
        raise StorageFailed(f"{named} does not exist; mount the key there or unset the variable") from exc
    except IsADirectoryError as exc:  # what Docker makes of a mount whose source is missing
        raise StorageFailed(f"{named} is a folder; was the key there when it was mounted?") from exc
    except OSError as exc:
        raise StorageFailed(
            f"{named} user {os.geteuid()} cannot read ({exc.strerror}); make it readable, or run as its owner"
        ) from exc
    except ValueError as exc:
        raise StorageFailed(f"{named} is not JSON; mount the key file as Google made it") from exc
    if not isinstance(key, dict) or "type" not in key:
        raise StorageFailed(f"{named} is JSON but no key (it has no type); mount the key as Google made it")


def _said(exc: Exception) -> str:
    return one_line(exc.args[0] if exc.args else exc)
