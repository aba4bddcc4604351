"""A picture's file → its pixels, or a small picture of it, in bounded memory whatever the file holds."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST: Final = 64_000_000
"""Pixels of a picture that is still opened: a small file may claim to have more than fit in memory."""
_PAPER: Final = "#ffffff"


def thumbnail(file: bytes, longest: int) -> Image.Image:
    """The picture as RGB, its longer side ``longest`` pixels, its proportions kept; transparent is white.

    Raises OSError or ValueError for what is no picture that can be read, and for one beyond LARGEST.
    """
    with _opened(file) as picture:
        picture.draft("RGB", (2 * longest, 2 * longest))  # a JPEG is read at a fraction of its size
        scale = longest / max(picture.size)
        size = (max(1, round(scale * picture.width)), max(1, round(scale * picture.height)))
        small = picture.convert("RGBA").resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    shown = Image.new("RGB", size, _PAPER)
    shown.paste(small, mask=small)
    return shown


def pixels(file: bytes) -> NDArray[np.uint8]:
    """The picture's pixels, uint8 (height, width, 3), RGB; raises as ``thumbnail`` does."""
    with _opened(file) as picture:
        return np.asarray(picture.convert("RGB"))


def _opened(file: bytes) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(file))
    except UnidentifiedImageError:
        raise ValueError("it is no picture") from None
    except Image.DecompressionBombError:
        raise ValueError("it claims more pixels than are ever opened") from None
    if picture.width * picture.height > LARGEST:
        raise ValueError(f"it has {picture.width:,} × {picture.height:,} pixels, which is too large")
    return picture
