"""Files that are read as images, whatever wrote them: refused by their header, and by one error."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from PIL import Image, PngImagePlugin

from text2img.images import FORMATS, encode, read_parameters
from text2img.images.contact_sheet import MAX_PIXELS, pixels, thumbnail

READERS = [read_parameters, pixels, lambda file: thumbnail(file, 64)]
IMAGE = Image.new("RGB", (64, 64), "red")


def _file(kind, **options):
    out = io.BytesIO()
    IMAGE.save(out, kind, **options)
    return out.getvalue()


def _chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width, height, *chunks):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([_chunk(b"IHDR", header), *chunks])


BOMB = _chunk(b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(bytes(200 * 2**20)))
HOSTILE = {
    "empty": b"",
    "no image": b"GIF89a, or so",
    "a header alone": _png(64, 64),
    "cut": _file("PNG")[:-30],
    "huge": _png(2**31 - 1, 2**31 - 1),
    "one over": _png(1, MAX_PIXELS + 1),
    "a bomb in its text": _png(64, 64, BOMB),
    "a profile that is none": _png(64, 64, _chunk(b"iCCP", b"x\0\0" + b"\xff" * 50)),
    "a JPEG cut in its EXIF": encode(IMAGE, {"prompt": "x" * 200}, FORMATS["jpeg"], None)[:100],
    **{kind: _file(kind) for kind in ("GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX")},
}


@pytest.mark.parametrize("file", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("read", READERS, ids=["parameters", "pixels", "thumbnail"])
def test_what_is_no_image_of_a_format_that_is_made_here_is_one_error(read, file):
    """Other formats' decoders do not see it, its size is checked before it is decoded, and all that its
    decoder raises is a ValueError of one line.
    """
    with pytest.raises(ValueError, match=r"^it [^\n]{,150}$"):
        read(file)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "null", "7", '"text"', "{", ""])
def test_parameters_that_are_no_object_are_one_error(text):
    """A PNG's text may be any JSON, or none."""
    mark = PngImagePlugin.PngInfo()
    mark.add_itxt("parameters", text)
    with pytest.raises(ValueError, match="it has no parameters"):
        read_parameters(_file("PNG", pnginfo=mark))
