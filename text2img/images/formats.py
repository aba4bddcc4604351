"""Pixels and what they were made with → the bytes of a PNG, JPEG or WebP file, and back to what it says.

The same arguments give the same bytes, so that a repeated upload can be compared. Knows no prompt.

What the picture was made with is one JSON object. In a PNG it stands in an iTXt chunk ``parameters`` (PNG
1.2, 11.3.4.5: UTF-8), in a JPEG or WebP in the EXIF tag UserComment (EXIF 2.32, 4.6.6: here UTF-16), where
programs for generated pictures look for it.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from PIL import Image, PngImagePlugin

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

JPEG_QUALITY: Final = 95
_RLE: Final = 3  # zlib's Z_RLE: at level 1 three times as fast as the default level 6, and no larger
_EXIF_IFD, _USER_COMMENT, _UNICODE = 0x8769, 0x9286, b"UNICODE\0"
_APP1, _EXIF = b"\xff\xe1", b"Exif\0\0"
_SEGMENT: Final = 65_533 - len(_EXIF)
"""Bytes of EXIF that one segment of a JPEG can hold."""


@dataclass(frozen=True, slots=True)
class Format:
    """How a kind of file is called and written: ``write`` takes an RGB picture, its JSON and the quality."""

    ending: str
    content_type: str
    write: Callable[[Image.Image, str, int | None], bytes]


def encode(
    picture: Image.Image, parameters: Mapping[str, object], kind: Format, quality: int | None
) -> bytes:
    """The file of an RGB picture that carries ``parameters``.

    ``quality`` in [1, 100] is the JPEG's (None: 95); a WebP is lossless where it is None; a PNG always is.
    """
    text = json.dumps(parameters, ensure_ascii=False)
    # A folder's name may hold bytes that are no text; as JSON writes them, they are.
    return kind.write(picture, text.encode("utf-8", "backslashreplace").decode(), quality)


def read_parameters(file: bytes) -> dict[str, Any]:
    """What ``encode`` wrote into the file beside the pixels; ValueError where there is no such thing."""
    with Image.open(io.BytesIO(file)) as picture:
        if isinstance(picture, PngImagePlugin.PngImageFile):
            text = picture.text.get("parameters", "")
        else:
            comment: bytes = picture.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
            text = comment.removeprefix(_UNICODE).decode("utf-16-be")
    read: dict[str, Any] = json.loads(text)
    return read


def _png(picture: Image.Image, text: str, quality: int | None) -> bytes:
    del quality
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt("parameters", text)
    return _saved(picture, "PNG", compress_level=1, compress_type=_RLE, pnginfo=chunk)


def _jpeg(picture: Image.Image, text: str, quality: int | None) -> bytes:
    """Colours are kept at full resolution, for the edges of coloured shapes and of the signature."""
    plain = _saved(picture, "JPEG", quality=quality or JPEG_QUALITY, subsampling="4:4:4")
    behind = 4 + int.from_bytes(plain[4:6])  # SOI, then APP0, which has to come first
    return plain[:behind] + _segments(_exif(text)) + plain[behind:]


def _webp(picture: Image.Image, text: str, quality: int | None) -> bytes:
    """Where it is lossless, ``quality`` and ``method`` are effort: quicker than usual, a little larger."""
    exif = _EXIF + _exif(text)
    if quality is None:
        return _saved(picture, "WEBP", lossless=True, quality=20, method=2, exif=exif)
    return _saved(picture, "WEBP", quality=quality, exif=exif)


def _saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _exif(text: str) -> bytes:
    """A TIFF structure, big-endian as its text is, with nothing but the comment."""
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _UNICODE + text.encode("utf-16-be")
    return exif.tobytes().removeprefix(_EXIF)


def _segments(exif: bytes) -> bytes:
    """APP1 segments. What one cannot hold (some 32,000 characters) goes on in the next, which Pillow puts
    together; EXIF itself knows but one, so that other readers may find no comment with such a prompt.
    """
    parts = [_EXIF + exif[start : start + _SEGMENT] for start in range(0, len(exif), _SEGMENT)]
    return b"".join(_APP1 + (len(part) + 2).to_bytes(2) + part for part in parts)


FORMATS: Final[dict[str, Format]] = {
    "png": Format(".png", "image/png", _png),
    "jpeg": Format(".jpg", "image/jpeg", _jpeg),
    "webp": Format(".webp", "image/webp", _webp),
}
