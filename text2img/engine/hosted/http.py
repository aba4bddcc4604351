"""One question over HTTP and its answer, bounded in time and size. Knows nothing of who is asked, and why."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from text2img import __version__
from text2img.concurrency.timeouts import within

if TYPE_CHECKING:
    from collections.abc import Mapping

    import requests

LARGEST: Final = 64 * 2**20
"""Bytes of an answer at the most: a picture of 16 million pixels fits, also one that stands in the JSON."""


class Unanswered(Exception):  # noqa: N818 - it says what happened
    """Nobody answered, or not to the end. The message says why, without anything secret."""


class TooLarge(Exception):  # noqa: N818 - the same
    """The answer is larger than LARGEST."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it came; ``headers`` are found whatever the case of their name."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Wire:
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
            return within(self._timeout + 1, lambda: self._exchange(session, method, url, key, document))
        except (requests.RequestException, OSError) as exc:  # TimeoutError is an OSError
            self._session = None  # what hangs in a thread that was left behind keeps the old one
            # Not from exc: a stack trace would show the address, which may be signed.
            raise Unanswered(self._fault(url, exc)) from None

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
