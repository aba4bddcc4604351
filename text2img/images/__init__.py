"""Pixels → a file: signed where an artist's name is asked for, in the format that is asked for, with the
parameters it was made with. Knows no model and no storage.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from text2img import __version__
from text2img.prompts.parameters import STYLE_CHECKS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image as Picture

    from text2img.images.signature import Signer
    from text2img.prompts import Parameters, Request


POSITION, OPACITY, FORMAT = "bottom-right", 128, "png"
"""What a picture gets where nobody wishes otherwise."""


@dataclass(frozen=True, slots=True)
class File:
    """A picture's file; ``ending`` (with its dot) is how its name shall end."""

    data: bytes
    content_type: str
    ending: str


class Encoder:
    """Pictures' files, the same bytes for the same arguments. Safe to use from several threads.

    ``signature_font`` is a font's file; without one the bundled font signs. Raises ConfigurationError where
    that file is no font.
    """

    def __init__(self, signature_font: str | None = None) -> None:
        self._path = signature_font
        if signature_font:
            _ = self._signer.font

    @cached_property
    def _signer(self) -> Signer:
        from text2img.images.signature import Signer

        return Signer(self._path)

    def check(self, wanted: Parameters) -> None:
        """Raise PromptFailed (``invalid_parameters``) for a name that cannot be drawn on such a picture."""
        if wanted.artist_name is not None:
            self._signer.check(wanted.artist_name, wanted.width, wanted.height)

    def encode(self, pixels: NDArray[np.uint8], wanted: Parameters, parameters: Mapping[str, object]) -> File:
        """The file of ``pixels`` (uint8, (height, width, 3), RGB), with ``parameters`` in it.

        Raises PromptFailed as ``check`` does.
        """
        from PIL import Image

        image = Image.fromarray(pixels)
        if wanted.artist_name is not None:
            opacity = OPACITY if wanted.signature_opacity is None else wanted.signature_opacity
            position = wanted.signature_position or POSITION
            image = self._signer.sign(image, wanted.artist_name, position, opacity)
        kind = FORMATS[wanted.image_format or FORMAT]
        return File(encode(image, parameters, kind, wanted.image_quality), kind.content_type, kind.ending)


def parameters(
    request: Request,
    *,
    scheduler: str,
    model: str,
    revision: str | None,
    approximations: Mapping[str, object],
) -> Mapping[str, object]:
    """Everything it takes to make the same picture again."""
    wanted = request.parameters
    style = {name: getattr(wanted, name) for name in STYLE_CHECKS}
    return {
        "prompt": request.text,
        "negative_prompt": wanted.negative_prompt,
        "seed": wanted.seed,
        "num_inference_steps": wanted.num_inference_steps,
        "guidance_scale": wanted.guidance_scale,
        "width": wanted.width,
        "height": wanted.height,
        "scheduler": scheduler,
        **({"loras": [lora.document for lora in wanted.loras]} if wanted.loras else {}),
        **{name: value for name, value in style.items() if value is not None},
        "model": model,
        "revision": revision,
        **approximations,
        "software": f"text2img {__version__}",
    }


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
    write: Callable[[Picture, str, int | None], bytes]


def encode(image: Picture, parameters: Mapping[str, object], kind: Format, quality: int | None) -> bytes:
    """The file of an RGB picture that carries ``parameters``.

    ``quality`` in [1, 100] is the JPEG's (None: 95); a WebP is lossless where it is None; a PNG always is.
    """
    text = json.dumps(parameters, ensure_ascii=False)
    # A folder's name may hold bytes that are no text; as JSON writes them, they are.
    return kind.write(image, text.encode("utf-8", "backslashreplace").decode(), quality)


def read_parameters(file: bytes) -> dict[str, Any]:
    """What ``encode`` wrote into the file beside the pixels; ValueError where there is no such thing."""
    from PIL import Image, PngImagePlugin

    with Image.open(io.BytesIO(file)) as image:
        if isinstance(image, PngImagePlugin.PngImageFile):
            text = image.text.get("parameters", "")
        else:
            comment: bytes = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
            text = comment.removeprefix(_UNICODE).decode("utf-16-be")
    read: dict[str, Any] = json.loads(text)
    return read


def _png(image: Picture, text: str, quality: int | None) -> bytes:
    from PIL import PngImagePlugin

    del quality
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt("parameters", text)
    return _saved(image, "PNG", compress_level=1, compress_type=_RLE, pnginfo=chunk)


def _jpeg(image: Picture, text: str, quality: int | None) -> bytes:
    """Colours are kept at full resolution, for the edges of coloured shapes and of the signature."""
    plain = _saved(image, "JPEG", quality=quality or JPEG_QUALITY, subsampling="4:4:4")
    behind = 4 + int.from_bytes(plain[4:6])  # SOI, then APP0, which has to come first
    return plain[:behind] + _segments(_exif(text)) + plain[behind:]


def _webp(image: Picture, text: str, quality: int | None) -> bytes:
    """Where it is lossless, ``quality`` and ``method`` are effort: quicker than usual, a little larger."""
    exif = _EXIF + _exif(text)
    if quality is None:
        return _saved(image, "WEBP", lossless=True, quality=20, method=2, exif=exif)
    return _saved(image, "WEBP", quality=quality, exif=exif)


def _saved(image: Picture, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _exif(text: str) -> bytes:
    """A TIFF structure, big-endian as its text is, with nothing but the comment."""
    from PIL import Image

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
