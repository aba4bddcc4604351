"""Who we are to Cloud Storage: what Google's library finds, and a sentence that says what is missing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import google.auth
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError

from text2img.concurrency.timeouts import within
from text2img.errors import StorageFailed
from text2img.storage.bucket import one_line

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
        return within(10, lambda: google.auth.default(scopes=_SCOPES)[0])
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
