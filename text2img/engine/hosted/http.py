"""HTTP exchanges bounded in time and size, and the images in their answers: data URLs, addresses, pixels."""

from __future__ import annotations

import base64
import binascii
import io
import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from text2img import __version__
from text2img.concurrency.timeouts import run_with_timeout
from text2img.engine.hosted import malformed_answer

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import requests
    from numpy.typing import NDArray
    from PIL import Image


MAX_BYTES: Final = 64 * 2**20
"""Maximum size of an answer: an image of 16 million pixels fits, even inside the JSON."""


class RequestFailed(Exception):  # noqa: N818 - named after the event
    """There is no answer, or no complete one. The message gives the reason and contains no secret."""


class TooLarge(Exception):  # noqa: N818 - named after the event
    """The answer is larger than MAX_BYTES."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer; the names of ``headers`` are case-insensitive."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpClient:
    """An HTTP client that keeps its connection between requests; for one thread at a time.

    ``timeout`` is in seconds, for one exchange, from the name lookup to the last byte. Proxies and
    certificates come from the environment, credentials never do. Redirects are not followed: they could send
    the key elsewhere.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._session: requests.Session | None = None

    def request(self, method: str, url: str, *, key: str | None = None, document: object = None) -> Answer:
        """Send a request and return the answer, whatever its status. Raises RequestFailed and TooLarge."""
        import requests

        session = self._session = self._session or self._open()
        try:
            return run_with_timeout(
                self._timeout + 1, lambda: self._exchange(session, method, url, key, document)
            )
        except (requests.RequestException, OSError) as exc:  # TimeoutError is an OSError
            self._session = None  # the abandoned thread may still use it
            # Not from exc: a stack trace would show the URL, which may be signed.
            raise RequestFailed(self._describe_error(url, exc)) from None

    def _open(self) -> requests.Session:
        """Return a session whose exchanges end in time, by themselves."""
        import requests

        from text2img.concurrency.http_limits import LimitedAdapter, TotalTime

        session = requests.Session()
        for scheme in ("http://", "https://"):
            session.mount(scheme, LimitedAdapter(TotalTime(self._timeout)))
        return session

    def _exchange(
        self, session: requests.Session, method: str, url: str, key: str | None, document: object
    ) -> Answer:
        def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
            """Set the key, if any. Passing an auth function also keeps requests from reading netrc."""
            if key is not None:
                request.headers["Authorization"] = f"Key {key}"
            return request

        with session.request(
            method,
            url,
            json=document,
            headers={"User-Agent": f"text2img/{__version__}", "Accept-Encoding": "identity"},
            auth=authorize,
            timeout=self._timeout,
            allow_redirects=False,
            stream=True,
        ) as response:
            return Answer(response.status_code, response.headers, _read(response))

    def _describe_error(self, url: str, exc: Exception) -> str:
        """Describe the error by its kind; the libraries' own messages contain the whole URL."""
        import requests

        host = urlsplit(url).hostname
        if isinstance(exc, (TimeoutError, requests.Timeout)):
            return f"{host} did not answer within {self._timeout:g} s"
        cause: BaseException | None = exc
        while cause is not None:
            if isinstance(cause, TimeoutError):
                return f"{host} did not answer within {self._timeout:g} s"
            if isinstance(cause, socket.gaierror):
                return f"{host} has no address: its name cannot be resolved"
            if isinstance(cause, ConnectionRefusedError):
                return f"{host} refuses connections"
            cause = cause.__cause__ or cause.__context__
        return f"{host} cannot be reached ({type(exc).__name__})"


def _read(response: requests.Response) -> bytes:
    """Return the body; raise TooLarge beyond MAX_BYTES, which count after decompression."""
    body = bytearray()
    for chunk in response.iter_content(2**16):
        body += chunk
        if len(body) > MAX_BYTES:
            raise TooLarge
    return bytes(body)


_HOSTS: Final = ("fal.media", "fal.ai", "fal.run")
"""The hosts where fal stores its models' output: these and their subdomains."""
_BUCKET_PREFIX: Final = ("storage.googleapis.com", "/falserverless/")
_BYTES_PER_PIXEL: Final = 8
"""Bytes of memory for each of the largest image's pixels, that decoding an image may take."""
_DECODER_BYTES: Final = {"PNG": 8, "JPEG": 8, "WEBP": 17}
"""What decoding takes for each pixel: Pillow's image (4), the result (3); WebP's decoder keeps two frames."""
_PROGRESSIVE_BYTES: Final = 4
"""What more a progressive JPEG takes, whose coefficients are all kept until the last scan."""
_STRIP_PIXELS: Final = 2**18
_DATA_URL = re.compile(r"data:image/(?:png|jpeg|jpg|webp);base64,", re.IGNORECASE)


def decode_data_url(url: str) -> bytes | None:
    """Return the bytes of a ``data:`` URL with an image; None for any other URL.

    Raises PromptFailed if they are not valid base64.
    """
    prefix = _DATA_URL.match(url)
    if prefix is None:
        return None
    try:
        return base64.b64decode(url[prefix.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise malformed_answer("an image that is not valid base64") from None


def check_address(url: str, origin: str | None) -> None:
    """Raise PromptFailed unless the URL is https:// at one of fal's own hosts.

    ``origin`` is the URL of the service that the operator uses instead of fal, which is then allowed too.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise malformed_answer("an address that cannot be parsed") from None
    if re.search(r"[\x00-\x20\x7f\\@]", url):
        raise malformed_answer("an address that cannot be parsed")
    if origin is not None and _origin(url) == _origin(origin):
        return
    is_fal = any(host == name or host.endswith(f".{name}") for name in _HOSTS)
    is_fal = is_fal or (host == _BUCKET_PREFIX[0] and parts.path.startswith(_BUCKET_PREFIX[1]))
    if parts.scheme != "https" or port not in {None, 443} or not is_fal:
        raise malformed_answer("an image at an address that is not fal's")


def decode(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Return the pixels: uint8, (height, width, 3), RGB.

    Raises PromptFailed for data that is not an image in PNG, JPEG or WebP, or that would take more memory
    than the largest image, of ``max_pixels``, may: its header shows that.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=tuple(_DECODER_BYTES)) as image:
            if image.width * image.height * _bytes_per_pixel(image) <= max_pixels * _BYTES_PER_PIXEL:
                return _rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pass
    except Exception:  # noqa: BLE001 - whatever a hostile file does to its decoder, only its prompt fails
        raise malformed_answer("a file that is not an image") from None
    raise malformed_answer("an image that is too large")


def _bytes_per_pixel(image: Image.Image) -> int:
    """Return the bytes that decoding the image takes, for each of its pixels."""
    is_progressive = "progressive" in image.info or "progression" in image.info
    return _DECODER_BYTES[str(image.format)] + (_PROGRESSIVE_BYTES if is_progressive else 0)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Return the image's pixels, converted in strips: never is the whole image there three times."""
    import numpy as np

    image.load()
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, width, bottom)).convert("RGB"))
    return pixels


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
