"""What a hosted service may cost: time, sockets, and the memory of an image."""

from __future__ import annotations

import gzip
import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.servers.slow import BODY, HEADERS, slow_server
from tests.waiting import until
from text2img.engine.hosted import queue_request
from text2img.engine.hosted.queue_request import HttpClient, RequestFailed, TooLarge, decode
from text2img.errors import ErrorCode, PromptFailed


@pytest.mark.parametrize("start", [b"", HEADERS, BODY])
def test_an_answer_that_trickles_is_hung_up_on(start):
    """After its time an exchange is over, with its socket, and the client asks again over a new one."""
    with slow_server(start, b"H") as server:
        client = HttpClient(0.3)
        for _ in range(3):
            with pytest.raises(RequestFailed, match=r"did not answer within 0\.3 s"):
                client.request("GET", server.url)
        until(lambda: server.closed == server.connections == 3)


def test_a_small_answer_that_unpacks_to_a_large_one_is_cut_off(httpserver, monkeypatch):
    """The size counts after decompression, and no more than that is unpacked."""
    monkeypatch.setattr(queue_request, "MAX_BYTES", 10**6)
    packed = gzip.compress(bytes(50 * 10**6))
    httpserver.expect_request("/").respond_with_data(packed, headers={"Content-Encoding": "gzip"})
    with pytest.raises(TooLarge):
        HttpClient(60).request("GET", httpserver.url_for("/"))


def _file(image, **options):
    out = io.BytesIO()
    image.save(out, **options)
    return out.getvalue()


LARGEST = 4096 * 4096


def _refusal(data, max_pixels=LARGEST):
    with pytest.raises(PromptFailed) as caught:
        decode(data, max_pixels)
    assert caught.value.code is ErrorCode.GENERATION_FAILED
    return str(caught.value)


def _png_header(width, height):
    """A PNG that claims to be so large, and holds nothing."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + b"\0\0\x10\0IDAT"


def test_dimensions_are_checked_before_anything_is_decoded():
    """A header is enough to refuse an image; one that may be decoded fails by what it holds."""
    for width, height in ((4097, 4096), (2**31 - 1, 2**31 - 1), (1, 2**25)):
        assert "too large" in _refusal(_png_header(width, height))
    assert "not an image" in _refusal(_png_header(4096, 4096))


@pytest.mark.parametrize(
    ("options", "fits", "too_large"),
    [
        ({"format": "PNG"}, 100, 101),
        ({"format": "JPEG"}, 100, 101),
        ({"format": "JPEG", "progressive": True}, 81, 82),
        ({"format": "WEBP"}, 68, 69),
        ({"format": "WEBP", "lossless": True}, 68, 69),
    ],
)
def test_a_format_that_takes_more_memory_may_have_fewer_pixels(options, fits, too_large):
    """The limit is the memory that decoding takes, which depends on the format."""
    small = _file(Image.new("RGB", (fits, fits)), **options)
    assert decode(small, 100 * 100).shape == (fits, fits, 3)
    assert "too large" in _refusal(_file(Image.new("RGB", (too_large, too_large)), **options), 100 * 100)


@pytest.mark.parametrize("format_name", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_no_images(format_name):
    """Only three formats are decoded, whatever Pillow knows."""
    assert "not an image" in _refusal(_file(Image.new("RGB", (32, 32)), format=format_name))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_pixels_are_those_of_the_whole_image(monkeypatch, mode):
    """An image that is converted in strips has the pixels of one that is converted at once."""
    monkeypatch.setattr(queue_request, "_STRIP_PIXELS", 100)
    noise = np.random.default_rng(0).integers(0, 256, (23, 31, 3), np.uint8)
    image = Image.fromarray(noise).convert("L" if mode == "I;16" else mode)
    image = image.convert("I;16") if mode == "I;16" else image
    data = _file(image, format="PNG")
    with Image.open(io.BytesIO(data)) as opened:
        assert (decode(data, LARGEST) == np.asarray(opened.convert("RGB"))).all()


MEASURE = """
import io, sys
from pathlib import Path
from PIL import Image
from text2img.engine.hosted import queue_request as http
def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
data = Path(sys.argv[1]).read_bytes()
small = io.BytesIO()
with Image.open(io.BytesIO(data)) as image:
    Image.new("RGB", (64, 64)).save(small, image.format)
http.decode(small.getvalue(), 2048 * 2048)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
http.decode(data, 2048 * 2048)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's peak")
@pytest.mark.parametrize(
    ("side", "options"),
    [
        (2048, {"format": "PNG"}),
        (2048, {"format": "JPEG"}),
        (1672, {"format": "JPEG", "progressive": True, "subsampling": 0}),
        (1404, {"format": "WEBP"}),
        (1404, {"format": "WEBP", "lossless": True, "method": 0}),
    ],
)
def test_decoding_takes_eight_bytes_a_pixel_of_the_largest(tmp_path, side, options):
    """The peak of a process that decodes the largest image of each format."""
    (tmp_path / "image").write_bytes(_file(Image.new("RGB", (side, side), "teal"), **options))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "image")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    slack = 2**21  # strips, buffers and the allocator's own
    assert int(done.stdout) <= 8 * 2048 * 2048 + slack
