"""One question over HTTP and its answer, bounded in time and size. Knows nothing of who is asked, and why."""

from __future__ import annotations

import base64
import binascii
import io
import re
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from text2img import __version__
from text2img.concurrency.timeouts import run_with_timeout
from text2img.engine.hosted import malformed

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import requests
    from numpy.typing import NDArray


LARGEST: Final = 64 * 2**20
"""Bytes of an answer at the most: a picture of 16 million pixels fits, also one that stands in the JSON."""


class RequestFailed(Exception):  # noqa: N818 - it says what happened
    """Nobody answered, or not to the end. The message says why, without anything secret."""


class TooLarge(Exception):  # noqa: N818 - the same
    """The answer is larger than LARGEST."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it came; ``headers`` are found whatever the case of their name."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpClient:
    """Keeps its connection from one question to the next; used from one thread at a time.

    ``timeout``: seconds for one exchange, from the name lookup to the last byte. Proxies and certificates
    come from the environment as usual, credentials never. Redirects are not followed, for the key's sake.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._session: requests.Session | None = None

    def ask(self, method: str, url: str, *, key: str | None = None, document: object = None) -> Answer:
        """The answer, whatever its status. Raises Unanswered and TooLarge."""
        import requests

        session = self._session = self._session or requests.Session()
        try:
            return run_with_timeout(
                self._timeout + 1, lambda: self._exchange(session, method, url, key, document)
            )
        except (requests.RequestException, OSError) as exc:  # TimeoutError is an OSError
            self._session = None  # what hangs in a thread that was left behind keeps the old one
            # Not from exc: a stack trace would show the address, which may be signed.
            raise RequestFailed(self._fault(url, exc)) from None

    def _exchange(
        self, session: requests.Session, method: str, url: str, key: str | None, document: object
    ) -> Answer:
        def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
            """That this is given at all keeps requests from reading netrc."""
            if key is not None:
                request.headers["Authorization"] = f"Key {key}"
            return request

        end = time.monotonic() + self._timeout
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
            return Answer(response.status_code, response.headers, _read(response, end))

    def _fault(self, url: str, exc: Exception) -> str:
        """What went wrong, by kind: the libraries' own words hold the whole URL."""
        import requests

        host = urlsplit(url).hostname
        if isinstance(exc, (TimeoutError, requests.Timeout)):
            return f"{host} did not answer within {self._timeout:g} s"
        cause: BaseException | None = exc
        while cause is not None:
            if isinstance(cause, socket.gaierror):
                return f"{host} has no address: the name is not known"
            if isinstance(cause, ConnectionRefusedError):
                return f"{host} refuses connections"
            cause = cause.__cause__ or cause.__context__
        return f"{host} cannot be reached ({type(exc).__name__})"


def _read(response: requests.Response, end: float) -> bytes:
    """The body. What trickles in is given up at ``end``, by the same thread that reads it."""
    body = bytearray()
    for piece in response.iter_content(2**16):
        body += piece
        if len(body) > LARGEST:
            raise TooLarge
        if time.monotonic() > end:
            raise TimeoutError
    return bytes(body)


_HOSTS: Final = ("fal.media", "fal.ai", "fal.run")
"""Where fal keeps what its models have made: these hosts and those below them."""
_BUCKET: Final = ("storage.googleapis.com", "/falserverless/")
_MOST_PIXELS: Final = 2**26
_DATA = re.compile(r"data:image/(?:png|jpeg|jpg|webp);base64,", re.IGNORECASE)


def inside(url: str) -> bytes | None:
    """The bytes that a ``data:`` URL holds; None for another kind of address."""
    start = _DATA.match(url)
    if start is None:
        return None
    try:
        return base64.b64decode(url[start.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise malformed("a picture that is no base64") from None


def check_address(url: str, origin: str | None) -> None:
    """Raise PromptFailed unless the address is https:// at one of fal's own hosts.

    ``origin`` is where the operator has sent the requests instead; then what is there may be fetched as well.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise malformed("an address that cannot be read") from None
    if re.search(r"[\x00-\x20\x7f\\@]", url):
        raise malformed("an address that cannot be read")
    if origin is not None and _origin(url) == _origin(origin):
        return
    ours = any(host == name or host.endswith(f".{name}") for name in _HOSTS)
    ours = ours or (host == _BUCKET[0] and parts.path.startswith(_BUCKET[1]))
    if parts.scheme != "https" or port not in {None, 443} or not ours:
        raise malformed("a picture at an address that is not fal's")


def decode(data: bytes) -> NDArray[np.uint8]:
    """The pixels: uint8, (height, width, 3), RGB. PromptFailed for what is no picture, or too large."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height <= _MOST_PIXELS:
                return np.asarray(image.convert("RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pass
    except Exception:  # noqa: BLE001 - whatever a hostile file does to its decoder, only its prompt fails
        raise malformed("what should be a picture is none") from None
    raise malformed("a picture that is too large")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
