"""Image files: encode pixels as PNG, JPEG or WebP, signed on request, with their parameters and XMP.

This package is independent of models and storage.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from text2img import __version__
from text2img.errors import ConfigurationError
from text2img.prompts.parameters import STYLE_CHECKS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray
    from PIL import PngImagePlugin
    from PIL.Image import Image as PILImage

    from text2img.images.provenance import ManifestSigner
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
    files say beyond their parameters. ``signer`` signs C2PA manifests. Raises ConfigurationError if the
    font's file is not a font.
    """

    def __init__(
        self,
        signature_font: str | None = None,
        marking: Marking | None = None,
        signer: ManifestSigner | None = None,
    ) -> None:
        self._path = signature_font
        self._marking = marking or Marking()
        self.signer = signer
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

    def sign(self, file: File, parameters: Mapping[str, object], delivered: bytes | None = None) -> File:
        """Return the file with a C2PA manifest, the same file without a signer.

        ``parameters`` are those that it was encoded with. The bytes differ at each call. Raises RunFailed.
        """
        if self.signer is None:
            return file
        text = _json(parameters, self._marking)
        return replace(file, data=self.signer.sign(file.data, file.content_type, text, delivered))


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
        **({} if requested.true_cfg_scale is None else {"true_cfg_scale": requested.true_cfg_scale}),
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


SOURCE_TYPE: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for media that a trained model generated."""
MAX_STATEMENT_CHARS: Final = 2_000
"""Of the creator, of the rights, and of the model's name in XMP."""
_MAX_PACKET: Final = 65_000
"""Bytes: a JPEG holds XMP in one segment of at most 65,502; a longer prompt is cut."""
_NAMESPACES: Final = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
}
_NOT_XML: Final = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ESCAPES: Final = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "\r": "&#13;"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Marking:
    """What images declare beyond their parameters: creator and rights, and where the prompt is kept.

    ``prompt`` None: in the parameters; True: in XMP as well; False: nowhere in the file.
    """

    creator: str | None = None
    rights: str | None = None
    prompt: bool | None = None

    def embedded(self, parameters: Mapping[str, object]) -> Mapping[str, object]:
        """Return the parameters that the file may contain."""
        if self.prompt is not False:
            return parameters
        return {name: value for name, value in parameters.items() if name not in PROMPT_FIELDS}

    def xmp(self, parameters: Mapping[str, object]) -> bytes:
        """Return the XMP packet, the same for the same parameters, of at most 65,000 bytes."""
        prompt = _prompt_information(parameters) if self.prompt else ""
        while len(packet := self._packet(parameters, prompt)) > _MAX_PACKET and prompt:
            excess = (len(packet) - _MAX_PACKET) / len(_escaped(prompt).encode())
            prompt = prompt[: int(len(prompt) * (1 - excess)) - 2] + "…" if excess < 1 else ""
        return packet

    def _packet(self, parameters: Mapping[str, object], prompt: str) -> bytes:
        values = {
            "Iptc4xmpExt:DigitalSourceType": SOURCE_TYPE,
            "xmp:CreatorTool": str(parameters.get("software") or f"text2img {__version__}"),
            "Iptc4xmpExt:AISystemUsed": str(parameters.get("model") or "")[:MAX_STATEMENT_CHARS],
            "Iptc4xmpExt:AISystemVersionUsed": str(parameters.get("revision") or "")[:MAX_STATEMENT_CHARS],
            "Iptc4xmpExt:AIPromptInformation": prompt,
        }
        lines = [f"  <{name}>{_escaped(value)}</{name}>\n" for name, value in values.items() if value]
        if self.creator:
            item = f"<rdf:li>{_escaped(self.creator)}</rdf:li>"
            lines.append(f"  <dc:creator><rdf:Seq>{item}</rdf:Seq></dc:creator>\n")
        if self.rights:
            item = f'<rdf:li xml:lang="x-default">{_escaped(self.rights)}</rdf:li>'
            lines.append(f"  <dc:rights><rdf:Alt>{item}</rdf:Alt></dc:rights>\n")
        declared = " ".join(f'xmlns:{prefix}="{url}"' for prefix, url in _NAMESPACES.items())
        return (
            '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
            f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF {declared}>\n'
            f' <rdf:Description rdf:about="">\n{"".join(lines)} </rdf:Description>\n'
            '</rdf:RDF></x:xmpmeta>\n<?xpacket end="w"?>'
        ).encode()


PROMPT_FIELDS: Final = ("prompt", "negative_prompt")
"""The parameters that are the prompt's text."""


def check_statement(option: str, value: str | None) -> str | None:
    """Return the text of ``--creator`` or ``--rights``, None for an empty one.

    Raises ConfigurationError, which names the ``option``, for a text that is too long or not XML's.
    """
    text = (value or "").strip()
    if len(text) > MAX_STATEMENT_CHARS:
        raise ConfigurationError(f"{option} must not be longer than {MAX_STATEMENT_CHARS:,} characters")
    if _NOT_XML.search(text):
        raise ConfigurationError(f"{option} contains a control character, which XMP cannot hold; remove it")
    return text or None


def _prompt_information(parameters: Mapping[str, object]) -> str:
    prompt, negative = (str(parameters.get(name) or "") for name in PROMPT_FIELDS)
    return f"{prompt}\nNegative prompt: {negative}" if negative else prompt


def _escaped(text: str) -> str:
    """Return the text for an element of XML."""
    return without_controls(text).translate(_ESCAPES)


def without_controls(text: str) -> str:
    """Return the text with U+FFFD for what XML 1.0 cannot hold."""
    return _NOT_XML.sub("\ufffd", text)


def read_xmp(packet: bytes) -> dict[str, str]:
    """Return the statements of an XMP packet that Marking writes, by name; raise ValueError if it is none.

    Other programs may have written them as attributes or as elements.
    """
    from xml.etree import ElementTree as ET

    if b"<!DOCTYPE" in packet or b"<!ENTITY" in packet:
        raise ValueError("it declares a document type")
    try:
        root = ET.fromstring(packet.strip(b"\0 \r\n\t").decode("utf-8-sig"))  # noqa: S314 - no entities
    except ET.ParseError as exc:
        raise ValueError("it is not XML") from exc
    found: dict[str, str] = {}
    for prefix, name in _STATEMENTS:
        tag = f"{{{_NAMESPACES[prefix]}}}{name}"
        element = next(root.iter(tag), None)
        if element is not None:
            items = [item.text or "" for item in element.iter(f"{{{_NAMESPACES['rdf']}}}li")]
            resource = element.get(f"{{{_NAMESPACES['rdf']}}}resource")
            found[name] = resource or "; ".join(items) or (element.text or "").strip()
        elif (holder := next((each for each in root.iter() if tag in each.attrib), None)) is not None:
            found[name] = holder.attrib[tag]
    return found


_STATEMENTS: Final = (
    *(("Iptc4xmpExt", "DigitalSourceType"), ("xmp", "CreatorTool"), ("Iptc4xmpExt", "AISystemUsed")),
    *(("Iptc4xmpExt", "AISystemVersionUsed"), ("Iptc4xmpExt", "AIPromptInformation")),
    *(("dc", "creator"), ("dc", "rights")),
)


JUMBF: Final = b"\x00\x11\x00\x10\x80\x00\x00\xaa\x00\x38\x9b\x71"
"""The end of every JUMBF box's type: it is in any file with a C2PA manifest."""


def mark_of(file: bytes, xmp: bytes) -> str | None:
    """Return which mark an image carries, C2PA or XMP, None for neither; it is not verified."""
    if holds_manifest(file):
        return "C2PA"
    try:
        statements = read_xmp(xmp)
    except ValueError:
        return None
    return "XMP" if is_generated(statements) else None


def is_generated(xmp: Mapping[str, str]) -> bool:
    """Return True if XMP declares that a model made the image, whole or in part."""
    return xmp.get("DigitalSourceType", "").endswith("rainedAlgorithmicMedia")


def holds_manifest(file: bytes) -> bool:
    """Return whether the file contains a C2PA manifest, or remains of one; it is not verified."""
    return JUMBF in file


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
    return kind.write(image, _json(parameters, marking), marking.xmp(parameters), quality)


def _json(parameters: Mapping[str, object], marking: Marking) -> str:
    text = json.dumps(marking.embedded(parameters), ensure_ascii=False)
    # A folder's name may contain bytes that are not text: write those as JSON escapes.
    return text.encode("utf-8", "backslashreplace").decode()


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


def overview_mark(*, shows_images: bool = False) -> PngImagePlugin.PngInfo:
    """Return the text that marks a PNG as an overview of this software, and with ``shows_images`` its XMP."""
    from PIL import PngImagePlugin

    mark = PngImagePlugin.PngInfo()
    for name, text in _OVERVIEW.items():
        mark.add_text(name, text)
    if shows_images:
        mark.add_itxt("XML:com.adobe.xmp", Marking().xmp({}).replace(b"/trained", b"/compositeWithTrained"))
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
