"""Where a picture's original may be linked to. Whatever is not surely harmless becomes no link."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, urlsplit

from text2img.prompts.object_names import quoted
from text2img.storage.reader import ENDINGS

if TYPE_CHECKING:
    from pathlib import Path

_PLAIN: Final = re.compile(r"[!-~]+")
"""Neither spaces nor control characters, which browsers drop before they read a URL's scheme."""
_BUCKET: Final = re.compile(r"(gs|s3)://([a-z0-9][a-z0-9._-]{1,220})/(.+)", re.DOTALL)
_LOGGED_IN: Final = "https://storage.cloud.google.com/"
"""Where Cloud Storage gives an object to whoever is logged in and may read it; a browser knows no gs://."""


def link_of(url: str, folder: Path) -> str | None:
    """What the page in ``folder`` (absolute) links a picture's URL to, or None where it links it to nothing.

    ``https://`` as it stands, ``gs://`` by way of Google's own page for it, ``s3://``, and a picture's file
    by its path from the page.
    """
    try:
        if url.startswith("https://"):
            return url if _PLAIN.fullmatch(url) and "\\" not in url and urlsplit(url).hostname else None
        if named := _BUCKET.fullmatch(url):
            scheme, bucket, path = named.groups()
            return f"{_LOGGED_IN if scheme == 'gs' else 's3://'}{bucket}/{quoted(path)}"
        if url.startswith("/") and url.lower().endswith(ENDINGS) and "\0" not in url:
            path = quote(os.path.relpath(url, folder).encode("utf-8", "surrogateescape"))
            return path if path.startswith("../") else f"./{path}"
    except ValueError:  # half a surrogate pair, a host that is none
        return None
    return None
