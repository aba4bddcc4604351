"""Where a picture is, said in URLs. Knows no storage."""

from __future__ import annotations

from urllib.parse import quote, unquote

_ON_GCS = "gs://"
_PUBLIC_ON_GCS = "https://storage.googleapis.com/"


def quoted(path: str) -> str:
    """An object's name as it stands in an ``https://`` URL (RFC 3986): UTF-8, slashes as they are."""
    return quote(path, safe="/~")


def public_gcs_url(bucket: str, path: str) -> str:
    """Where anybody finds an object of Cloud Storage, provided that they may read it."""
    return f"{_PUBLIC_ON_GCS}{bucket}/{quoted(path)}"


def gcs_url(image_url: str | None) -> str | None:
    """The ``gs://`` URL of a picture on Cloud Storage, also from its public one; None for any other."""
    url = image_url or ""
    if url.startswith(_PUBLIC_ON_GCS):
        return _ON_GCS + unquote(url.removeprefix(_PUBLIC_ON_GCS))
    return url if url.startswith(_ON_GCS) else None
