"""Small pictures of pictures: a file's bytes → a WebP in a data: URL. Knows neither places nor pages."""

from __future__ import annotations

import base64
import io
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from text2img.errors import Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image

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
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            size = picture.size
            if size[0] * size[1] > _MOST_PIXELS:
                raise Image.DecompressionBombError  # noqa: TRY301 - as Pillow itself does, at another number
            quality = _QUALITY if max(size) > SIDE else _QUALITY_OF_SMALL
            return Thumbnail(_encoded(_small(picture), quality), size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise Unreadable(f"it has more than {_MOST_PIXELS:,} pixels: too many for a thumbnail") from exc
    except Exception as exc:  # whatever a decoder says of bytes that anybody may have written
        reason = "it is broken or of another format" if isinstance(exc, OSError) else type(exc).__name__
        raise Unreadable(f"it is no picture that can be read: {reason}") from exc


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


def _small(picture: Image) -> Image:
    picture.draft("RGB", (2 * SIDE, 2 * SIDE))  # a JPEG is decoded at a fraction of its size
    clear = picture.mode in {"RGBA", "LA", "PA"} or "transparency" in picture.info
    small = picture.convert("RGBA" if clear else "RGB")
    small.thumbnail((SIDE, SIDE), reducing_gap=2.0)
    return small


def _encoded(picture: Image, quality: int) -> str:
    written = io.BytesIO()
    picture.save(written, "WEBP", quality=quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(written.getvalue()).decode('ascii')}"
