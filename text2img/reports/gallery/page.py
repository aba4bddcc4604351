"""The report's HTML page, rendered piece by piece, and its thumbnails.

The data are in ``<script type="application/json">`` elements, which never run. ``tojson`` escapes every ``<``
in them, so that no text can end the element. The page's policy forbids scripts and resources from outside the
file.
"""

from __future__ import annotations

import base64
import hashlib
import io
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from text2img.errors import ObjectUnreadable
from text2img.images import mark_of
from text2img.reports import render

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from PIL.Image import Image


_GROUP_SIZES: Final = {"items": 100, "thumbnails": 32}
"""Values in one script element. The page parses thumbnails when one of the element's comes into view; it has
their number too, in page/1-data.js."""


def page(data: Iterable[tuple[str, Any]], summary: Callable[[], Mapping[str, Any]]) -> Iterator[str]:
    """Yield the page piece by piece; it holds the data of one script element of each kind in memory.

    ``data`` are values with their kind, "items" or "thumbnails"; items name thumbnails by their number, from
    0. ``summary`` is called after the last of them.
    """
    folder = files("text2img.reports.gallery") / "page"
    scripts = sorted(
        (file for file in folder.iterdir() if file.name.endswith(".js")), key=lambda file: file.name
    )
    body = "".join(file.read_text("utf-8") for file in scripts)
    script = f'"use strict";\n(() => {{\n{body}}})();\n'
    style = (folder / "page.css").read_text("utf-8")
    return render(
        "text2img.reports.gallery",
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        elements=_grouped(data),
        summary=summary,
    )


def _grouped(data: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """Yield groups of values with their kind: each when it is full, and the remaining ones at the end."""
    groups: dict[str, list[Any]] = {kind: [] for kind in _GROUP_SIZES}
    for kind, value in data:
        groups[kind].append(value)
        if len(groups[kind]) == _GROUP_SIZES[kind]:
            yield kind, groups[kind]
            groups[kind] = []
    yield from ((kind, values) for kind, values in groups.items() if values)


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
    """A thumbnail: ``url`` is a ``data:`` URL; the original has ``size``, in pixels, and ``mark``."""

    url: str
    size: tuple[int, int]
    mark: str | None


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
            mark = mark_of(data, image.info.get("xmp", b""))
            return Thumbnail(_data_url(_small(image), quality), size, mark)
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
