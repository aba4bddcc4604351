"""The report's file, written piece by piece: the template, its styles and script, and the data in between.

Data stands in ``<script type="application/json">``, which no browser runs, with every ``<`` escaped, so that
no text can end it. The page's own policy lets nothing run or be loaded but what stands in it.
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
"""Items in a script."""
_THUMBNAILS: Final = 32
"""Thumbnails in a script, which is read when one of them comes into view; page/1-data.js knows the number."""


class Page:
    """A page that is being written to an open file: ``add`` what there is, then ``finish``.

    What it holds in memory is what stands in one script.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        head, self._tail = _template()
        self._items: list[Mapping[str, Any]] = []
        self._thumbnails: list[str] = []
        self.thumbnails = 0
        file.write(head)

    def thumbnail(self, url: str) -> int:
        """Add a thumbnail, a ``data:`` URL; the number by which items name it."""
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
        """Write the rest, and what is said of all of it."""
        self._flush("items", self._items)
        self._flush("thumbnails", self._thumbnails)
        self._file.write(f'<script type="application/json" id="summary">{as_json(summary)}</script>\n')
        self._file.write(self._tail)

    def _flush(self, kind: str, waiting: list[Any]) -> None:
        if waiting:
            self._file.write(f'<script type="application/json" class="{kind}">{as_json(waiting)}</script>\n')
            waiting.clear()


def as_json(value: object) -> str:
    """JSON that can stand in a script: ASCII, and no ``<`` that could begin an end tag or a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _template() -> tuple[str, str]:
    """What stands before the data, and what after it."""
    folder = files("text2img.reports.gallery") / "page"
    scripts = sorted(
        (each for each in folder.iterdir() if each.name.endswith(".js")), key=lambda each: each.name
    )
    body = "".join(each.read_text("utf-8") for each in scripts)
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
    """How a policy names a script or style that may stand in the page."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


SIDE: Final = 256
"""Pixels of a thumbnail's longer side, at the most."""
_QUALITY: Final = 74
_QUALITY_OF_SMALL: Final = 90
"""Of originals that are no larger themselves: shown large, they show every fault."""
_MOST_PIXELS: Final = 64_000_000
"""A picture with more would take a quarter of a gigabyte to look at; no model draws as many."""
_FORMATS: Final = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """``url`` is a ``data:`` URL; ``size`` is the original's width and height in pixels."""

    url: str
    size: tuple[int, int]


def thumbnail(data: bytes) -> Thumbnail:
    """The thumbnail of a PNG, JPEG or WebP file; raises Unreadable for what is none, or is too large."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            size = image.size
            if size[0] * size[1] > _MOST_PIXELS:
                raise Image.DecompressionBombError  # noqa: TRY301 - as Pillow itself does, at another number
            quality = _QUALITY if max(size) > SIDE else _QUALITY_OF_SMALL
            return Thumbnail(_encoded(_small(image), quality), size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ObjectUnreadable(f"it has more than {_MOST_PIXELS:,} pixels: too many for a thumbnail") from exc
    except Exception as exc:  # whatever a decoder says of bytes that anybody may have written
        reason = "it is broken or of another format" if isinstance(exc, OSError) else type(exc).__name__
        raise ObjectUnreadable(f"it is no picture that can be read: {reason}") from exc


@contextmanager
def quiet() -> Iterator[None]:
    """Pillow warns nobody inside; a picture of too many pixels is an error. For the thread that starts the
    others: Python's filters belong to all of them.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _small(image: Image) -> Image:
    image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a JPEG is decoded at a fraction of its size
    clear = image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info
    small = image.convert("RGBA" if clear else "RGB")
    small.thumbnail((SIDE, SIDE), reducing_gap=2.0)
    return small


def _encoded(image: Image, quality: int) -> str:
    written = io.BytesIO()
    image.save(written, "WEBP", quality=quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(written.getvalue()).decode('ascii')}"
