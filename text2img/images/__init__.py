"""Image files: encode pixels as PNG, JPEG or WebP, signed on request, with the generation's parameters.

This package is independent of models and storage.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from text2img import __version__
from text2img.images.provenance import Marking
from text2img.prompts.parameters import STYLE_CHECKS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray
    from PIL import PngImagePlugin
    from PIL.Image import Image as PILImage

    from text2img.images.signature import Signer
    from text2img.prompts import Parameters, Request


POSITION, OPACITY, FORMAT = "bottom-right", 128, "png"
"""The defaults of signature position, signature opacity and file format."""


@dataclass(frozen=True, slots=True)
class File:
    """An image file; ``ending`` (with its dot) belongs at the end of its name."""

    data: bytes
    content_type: str
    ending: str


class Encoder:
    """An encoder of image files: the same arguments give the same bytes. Safe to use from several threads.

    ``signature_font`` is the path of a font file; the default is the bundled font. ``marking`` is what the
    files say beyond their parameters. Raises ConfigurationError if the font's file is not a font.
    """

    def __init__(self, signature_font: str | None = None, marking: Marking | None = None) -> None:
        self._path = signature_font
        self._marking = marking or Marking()
        if signature_font:
            _ = self._signer.font

    @cached_property
    def _signer(self) -> Signer:
        from text2img.images.signature import Signer

        return Signer(self._path)

    def check(self, requested: Parameters) -> None:
        """Raise PromptFailed (``invalid_parameters``) if the artist's name cannot be drawn on the image."""
        if requested.artist_name is not None:
            self._signer.check(requested.artist_name, requested.width, requested.height)

    def encode(
        self, pixels: NDArray[np.uint8], requested: Parameters, parameters: Mapping[str, object]
    ) -> File:
        """Encode ``pixels`` (uint8, (height, width, 3), RGB) as a file that contains ``parameters``.

        Raises PromptFailed as ``check`` does.
        """
        from PIL import Image

        image = Image.fromarray(pixels)
        if requested.artist_name is not None:
            opacity = OPACITY if requested.signature_opacity is None else requested.signature_opacity
            position = requested.signature_position or POSITION
            image = self._signer.sign(image, requested.artist_name, position, opacity)
        kind = FORMATS[requested.image_format or FORMAT]
        data = encode(image, parameters, kind, requested.image_quality, self._marking)
        return File(data, kind.content_type, kind.ending)


def parameters(
    request: Request,
    *,
    scheduler: str,
    model: str,
    revision: str | None,
    approximations: Mapping[str, object],
) -> Mapping[str, object]:
    """Return everything needed to generate the same image again."""
    requested = request.parameters
    style = {name: getattr(requested, name) for name in STYLE_CHECKS}
    return {
        "prompt": request.text,
        "negative_prompt": requested.negative_prompt,
        "seed": requested.seed,
        "num_inference_steps": requested.num_inference_steps,
        "guidance_scale": requested.guidance_scale,
        "width": requested.width,
        "height": requested.height,
        "scheduler": scheduler,
        **({"loras": [lora.document for lora in requested.loras]} if requested.loras else {}),
        **{name: value for name, value in style.items() if value is not None},
        "model": model,
        "revision": revision,
        **approximations,
        "software": f"text2img {__version__}",
    }


JPEG_QUALITY: Final = 95
_RLE: Final = 3  # zlib's Z_RLE: at level 1 three times as fast as the default at level 6, and no larger
_EXIF_IFD, _USER_COMMENT, _UNICODE = 0x8769, 0x9286, b"UNICODE\0"
_APP1, _EXIF, _XMP = b"\xff\xe1", b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_MAX_SEGMENT_BYTES: Final = 65_533 - len(_EXIF)
"""The EXIF bytes that fit into one JPEG segment."""


@dataclass(frozen=True, slots=True)
class Format:
    """A file format; ``write`` encodes an RGB image with its JSON metadata, its XMP and the quality."""

    ending: str
    content_type: str
    write: Callable[[PILImage, str, bytes, int | None], bytes]


def encode(
    image: PILImage,
    parameters: Mapping[str, object],
    kind: Format,
    quality: int | None,
    marking: Marking | None = None,
) -> bytes:
    """Encode an RGB image as a file that contains ``parameters``, and XMP by ``marking``.

    ``quality`` is in [1, 100]. If it is None, a JPEG gets 95 and a WebP is lossless; a PNG always is.
    """
    marking = marking or Marking()
    text = json.dumps(marking.embedded(parameters), ensure_ascii=False)
    # A folder's name may contain bytes that are not text: write those as JSON escapes.
    text = text.encode("utf-8", "backslashreplace").decode()
    return kind.write(image, text, marking.xmp(parameters), quality)


def read_parameters(file: bytes) -> dict[str, Any]:
    """Return the parameters that ``encode`` wrote into the file, without decoding the image.

    Raises ValueError for a file that has none, whatever it is.
    """
    try:
        with open_image(file) as image:
            return {**_embedded(image)}  # TypeError if it is not an object
    except Exception as exc:  # a hostile file may do anything to its decoder
        raise ValueError(f"it has no parameters of this software ({type(exc).__name__})") from exc


def open_image(file: bytes) -> PILImage:
    """Open an image of a format that is generated here; no other decoder sees the file.

    Raises Pillow's errors, among them DecompressionBombError for an image that declares too many pixels.
    """
    from PIL import Image

    return Image.open(io.BytesIO(file), formats=["PNG", "JPEG", "WEBP"])


_OVERVIEW: Final = {"Software": f"text2img {__version__}", "Title": "overview of a run"}


def overview_mark() -> PngImagePlugin.PngInfo:
    """Return the text that marks a PNG as an overview made by this software: a later one may replace it."""
    from PIL import PngImagePlugin

    mark = PngImagePlugin.PngInfo()
    for name, text in _OVERVIEW.items():
        mark.add_text(name, text)
    return mark


def is_overview(file: bytes) -> bool:
    """Return whether the file is a PNG with the mark of an overview, of any version of this software."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
            software, title = (str(image.info.get(name)) for name in _OVERVIEW)
    except Exception:  # noqa: BLE001 - whatever a file does to its decoder, it is no overview
        return False
    return software.startswith("text2img ") and title == _OVERVIEW["Title"]


_ROUNDING: Final = 2.0
"""Levels of 255, on average, by which another batch size or device may change an image."""


class Duplicate:
    """A test whether other files are the same image as ``file``, which ``encode`` made.

    ``pixels`` are those of the last file that was: uint8, (height, width, 3), RGB.
    """

    def __init__(self, file: bytes) -> None:
        self._file = file
        self.pixels: NDArray[np.uint8] | None = None

    def matches(self, other: bytes, *, any_version: bool = False) -> bool:
        """Return whether the other file is a whole image of the same parameters, size and format.

        With ``any_version`` another version of this software may have made it. The other file may be
        anything: all that cannot be read is no match. Its dimensions are compared before it is decoded.
        """
        import numpy as np

        with open_image(self._file) as ours:
            expected, size, kind = _embedded(ours), ours.size, ours.format
        try:
            with open_image(other) as image:
                found = _embedded(image) if (image.size, image.format) == (size, kind) else {}
                if any_version:
                    found = {**found, "software": expected.get("software")}
                if found != expected:
                    return False
                pixels = np.asarray(image.convert("RGB"))
                # Without its prompt, an image of another prompt could have the same parameters.
                if not expected.get("prompt") and not self._looks_like(pixels):
                    return False
                self.pixels = pixels
        except Exception:  # noqa: BLE001 - whatever a hostile file does to its decoder, it is no match
            return False
        return True

    def _looks_like(self, pixels: NDArray[np.uint8]) -> bool:
        """Return whether the pixels are those of ``file``, but for rounding."""
        import numpy as np

        with open_image(self._file) as ours:
            difference = np.asarray(ours.convert("RGB"), np.int16) - pixels
        return float(np.abs(difference).mean()) <= _ROUNDING


def _embedded(image: PILImage) -> dict[str, Any]:
    """Return the parameters in an opened image, read without its pixels; ``encode`` writes them first."""
    parameters: dict[str, Any] = json.loads(embedded_text(image))
    return parameters


def embedded_text(image: PILImage) -> str:
    """Return the JSON of the parameters in an opened image, read without its pixels; empty without one."""
    if image.format == "PNG":
        return str(image.info.get("parameters", ""))
    comment: bytes = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
    return comment.removeprefix(_UNICODE).decode("utf-16-be")


def _png(image: PILImage, text: str, xmp: bytes, quality: int | None) -> bytes:
    from PIL import PngImagePlugin

    del quality
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt("parameters", text)
    chunk.add_itxt("XML:com.adobe.xmp", xmp)
    return _save(image, "PNG", compress_level=1, compress_type=_RLE, pnginfo=chunk)


def _jpeg(image: PILImage, text: str, xmp: bytes, quality: int | None) -> bytes:
    """Encode a JPEG with colours at full resolution, for the edges of coloured shapes and the signature."""
    plain = _save(image, "JPEG", quality=quality or JPEG_QUALITY, subsampling="4:4:4")
    app1_start = 4 + int.from_bytes(plain[4:6])  # after SOI and APP0, which must come first
    marks = _app1_segments(_exif(text)) + _app1(_XMP + xmp)
    return plain[:app1_start] + marks + plain[app1_start:]


def _webp(image: PILImage, text: str, xmp: bytes, quality: int | None) -> bytes:
    """Encode a WebP; a lossless one with less effort than the default: faster and slightly larger."""
    exif = _EXIF + _exif(text)
    if quality is None:
        return _save(image, "WEBP", lossless=True, quality=20, method=2, exif=exif, xmp=xmp)
    return _save(image, "WEBP", quality=quality, exif=exif, xmp=xmp)


def _save(image: PILImage, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _exif(text: str) -> bytes:
    """Return a TIFF structure, big-endian like its text, with only the comment."""
    from PIL import Image

    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _UNICODE + text.encode("utf-16-be")
    return exif.tobytes().removeprefix(_EXIF)


def _app1_segments(exif: bytes) -> bytes:
    """Split EXIF data into APP1 segments.

    One segment holds some 32,000 characters; the rest continues in the next, and Pillow joins them. EXIF
    itself allows only one segment, so other readers may find no comment with such a prompt.
    """
    starts = range(0, len(exif), _MAX_SEGMENT_BYTES)
    return b"".join(_app1(_EXIF + exif[start : start + _MAX_SEGMENT_BYTES]) for start in starts)


def _app1(content: bytes) -> bytes:
    return _APP1 + (len(content) + 2).to_bytes(2) + content


FORMATS: Final[dict[str, Format]] = {
    "png": Format(".png", "image/png", _png),
    "jpeg": Format(".jpg", "image/jpeg", _jpeg),
    "webp": Format(".webp", "image/webp", _webp),
}
