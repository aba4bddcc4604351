"""The report's HTML file, written piece by piece, and its thumbnails.

The data are in ``<script type="application/json">`` elements, which never run. Every ``<`` is escaped, so
that no text can end the element. The page's policy forbids scripts and resources from outside the file.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import IO, TYPE_CHECKING, Any, Final

from text2img.errors import ObjectUnreadable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from PIL.Image import Image


_ITEMS: Final = 100
"""Items in one script element."""
_THUMBNAILS: Final = 32
"""Thumbnails in one script element, parsed when one of them comes into view; as in page/1-data.js."""


class Page:
    """A page that is being written to an open file: call ``add`` for each item, then ``finish``.

    It holds the data of one script element in memory.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        head, self._tail = _template()
        self._items: list[Mapping[str, Any]] = []
        self._thumbnails: list[str] = []
        self.thumbnails = 0
        file.write(head)

    def thumbnail(self, url: str) -> int:
        """Add a thumbnail, a ``data:`` URL; return the number by which items refer to it."""
        self._thumbnails.append(url)
        if len(self._thumbnails) == _THUMBNAILS:
            self._flush("thumbnails", self._thumbnails)
        self.thumbnails += 1
        return self.thumbnails - 1

    def add(self, item: Mapping[str, Any]) -> None:
        """Add an item."""
        self._items.append(item)
        if len(self._items) == _ITEMS:
            self._flush("items", self._items)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the remaining data and the summary."""
        self._flush("items", self._items)
        self._flush("thumbnails", self._thumbnails)
        self._file.write(f'<script type="application/json" id="summary">{as_json(summary)}</script>\n')
        self._file.write(self._tail)

    def _flush(self, kind: str, data: list[Any]) -> None:
        if data:
            self._file.write(f'<script type="application/json" class="{kind}">{as_json(data)}</script>\n')
            data.clear()


def as_json(value: object) -> str:
    """Return JSON for a script element: ASCII, without ``<``, which could begin an end tag or a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _template() -> tuple[str, str]:
    """Return the page's text before the data, and the text after it."""
    folder = files("text2img.reports.gallery") / "page"
    scripts = sorted(
        (file for file in folder.iterdir() if file.name.endswith(".js")), key=lambda file: file.name
    )
    body = "".join(file.read_text("utf-8") for file in scripts)
    script = f'"use strict";\n(() => {{\n{body}}})();\n'
    style = (folder / "page.css").read_text("utf-8")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    page = (folder / "page.html").read_text("utf-8").replace("{csp}", policy)
    head, _, tail = page.partition("{data}\n")
    return head.replace("{style}", style), tail.replace("{script}", script)


def _hash(text: str) -> str:
    """Return the hash by which a policy allows a script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


SIDE: Final = 256
"""Maximum pixels of a thumbnail's longer side."""
_QUALITY: Final = 74
_QUALITY_OF_SMALL: Final = 90
"""Quality for originals that are no larger than a thumbnail: enlarged, they would show every artefact."""
_MAX_PIXELS: Final = 64_000_000
"""Decoding a larger image takes a quarter of a gigabyte; no model generates one."""
_FORMATS: Final = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A thumbnail: ``url`` is a ``data:`` URL, ``size`` the original's width and height in pixels."""

    url: str
    size: tuple[int, int]


def thumbnail(data: bytes) -> Thumbnail:
    """Return the thumbnail of a PNG, JPEG or WebP file.

    Raises ObjectUnreadable for any other file, and for an image with too many pixels.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            size = image.size
            if size[0] * size[1] > _MAX_PIXELS:
                raise Image.DecompressionBombError  # noqa: TRY301 - as Pillow does, at another limit
            quality = _QUALITY if max(size) > SIDE else _QUALITY_OF_SMALL
            return Thumbnail(_data_url(_small(image), quality), size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ObjectUnreadable(f"it has more than {_MAX_PIXELS:,} pixels: too many for a thumbnail") from exc
    except Exception as exc:  # a decoder may raise anything on untrusted bytes
        reason = "it is broken or of another format" if isinstance(exc, OSError) else type(exc).__name__
        raise ObjectUnreadable(f"it is not a readable image: {reason}") from exc


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress Pillow's warnings in the block; an image with too many pixels raises an exception instead.

    Use it in the thread that starts the others: Python's warning filters are global.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _small(image: Image) -> Image:
    image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a JPEG is decoded at a fraction of its size
    has_alpha = image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info
    small = image.convert("RGBA" if has_alpha else "RGB")
    small.thumbnail((SIDE, SIDE), reducing_gap=2.0)
    return small


def _data_url(image: Image, quality: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
