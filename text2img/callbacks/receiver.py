"""Who is told: one POST, signed, and what the answer means. Knows HTTP, and nothing of databases."""

from __future__ import annotations

import base64
import binascii
import email.utils
import logging
import re
import secrets
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from text2img import __version__
from text2img.deadline import within
from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import requests

    from text2img.databases import Notice

_log = logging.getLogger(__name__)
_LONGEST_WAIT = 60.0  # seconds between tries of our own accord
_LONGEST_ASKED = 3600.0  # seconds for which a receiver may put us off
_AGAIN = frozenset({408, 429})


class Result(StrEnum):
    """How a try went."""

    TOLD = "told"  # 2xx: the receiver has it
    REFUSED = "refused"  # it will never take it: 3xx, 410, other 4xx
    LATER = "later"  # 408, 429, 5xx, or nobody answered


@dataclass(frozen=True, slots=True)
class Verdict:
    """A try's result; ``detail`` says why, without anything secret.

    For LATER, in seconds: ``wait`` is what we would wait, ``asked`` what the receiver has asked for
    (Retry-After; 0 where it has not). The next try is due after the longer of the two.
    """

    result: Result
    detail: str
    wait: float = 0.0
    asked: float = 0.0


class Receiver:
    """A URL that is told by POST. ``secret`` (``whsec_…``) signs; ``token`` goes as a bearer token.

    ``timeout``: seconds for one try from name lookup to status line. Proxies and certificates come from
    the environment as usual, credentials never (no netrc). Safe to use from several threads. Raises
    ConfigurationError for a URL, secret or token that cannot be used, without showing it.
    """

    def __init__(
        self, url: str, secret: str | None = None, token: str | None = None, timeout: float = 10.0
    ) -> None:
        self.timeout = timeout
        self.shown = _check_url(url)
        self._url = url
        self._key = None if secret is None else _key(secret)
        self._token = None if token is None else _check_token(token)

    def send(self, notice: Notice) -> Verdict:
        """Try once. Never raises; the answer's body is not read."""
        try:
            status, retry_after = within(self.timeout + 1, lambda: self._request("POST", notice))
        except Exception as exc:  # noqa: BLE001 - whatever a receiver does, the run goes on
            _log.debug("callback %s failed", notice.id, exc_info=not isinstance(exc, TimeoutError))
            return Verdict(Result.LATER, self._fault(exc), _growing(notice.tries))
        return self._verdict(status, retry_after, notice.tries)

    def ping(self) -> Verdict:
        """Whether somebody answers there, for ``doctor``: TOLD, or LATER with the reason.

        Sends HEAD, which no receiver may take for a result (RFC 9110, 9.2.1), by the way that a POST takes:
        the same name lookup, proxy, certificate check and token. Any answer below 500 will do, and 501, since
        few receivers know HEAD; so a wrong token or path is not found out.
        """
        try:
            status, _ = within(self.timeout + 1, lambda: self._request("HEAD", None))
        except Exception as exc:  # noqa: BLE001 - as above
            return Verdict(Result.LATER, self._fault(exc))
        detail = f"{self.shown} answers ({status} to HEAD)"
        answers = status < 500 or status == HTTPStatus.NOT_IMPLEMENTED
        return Verdict(Result.TOLD if answers else Result.LATER, detail)

    def _request(self, method: str, notice: Notice | None) -> tuple[int, str | None]:
        """The answer's status and its Retry-After."""
        import requests

        body = None if notice is None else notice.body.encode()
        with (
            # A session of its own: a kept connection that has died in between would cost a try.
            requests.Session() as session,
            session.request(
                method,
                self._url,
                data=body,
                headers=self._headers(notice),
                auth=self._authorize,
                timeout=self.timeout,
                allow_redirects=False,
                stream=True,
            ) as response,
        ):
            return response.status_code, response.headers.get("retry-after")

    def _headers(self, notice: Notice | None) -> Mapping[str, str]:
        headers = {"User-Agent": f"text2img/{__version__}"}
        if notice is None:
            return headers
        now = datetime.now(UTC)
        headers["Content-Type"] = "application/json"
        headers["webhook-id"] = notice.id
        headers["webhook-timestamp"] = str(int(now.timestamp()))
        if self._key is not None:
            from standardwebhooks import Webhook

            headers["webhook-signature"] = Webhook(self._key).sign(notice.id, now, notice.body)
        return headers

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Set the credentials that are ours. That this is given at all keeps requests from reading netrc."""
        parts = urlsplit(self._url)
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        elif parts.username is not None:
            from requests.auth import HTTPBasicAuth
            from requests.utils import get_auth_from_url

            request = HTTPBasicAuth(*get_auth_from_url(self._url))(request)
        return request

    def _verdict(self, status: int, retry_after: str | None, tries: int) -> Verdict:
        detail = f"{self.shown} answered {status}"
        if 200 <= status < 300:
            return Verdict(Result.TOLD, detail)
        if status in _AGAIN or status >= 500:
            return Verdict(Result.LATER, detail, _growing(tries), _seconds(retry_after))
        if 300 <= status < 400:
            detail += "; redirects are not followed, give the final address as --callback-url"
        return Verdict(Result.REFUSED, detail)

    def _fault(self, exc: Exception) -> str:
        """What went wrong, by kind: the libraries' own words hold the whole URL."""
        import requests

        if isinstance(exc, (TimeoutError, requests.Timeout)):
            return f"{self.shown} did not answer within {self.timeout:g} s"
        cause: BaseException | None = exc
        while cause is not None:
            if isinstance(cause, socket.gaierror):
                return f"{self.shown} has no address: the name is not known"
            if isinstance(cause, ConnectionRefusedError):
                return f"{self.shown} refuses connections"
            cause = cause.__cause__ or cause.__context__
        kinds = (
            (requests.exceptions.ProxyError, "the proxy fails"),
            (requests.exceptions.SSLError, "TLS fails"),
        )
        reason = next((words for kind, words in kinds if isinstance(exc, kind)), type(exc).__name__)
        return f"{self.shown} cannot be reached ({reason})"


def _growing(tries: int) -> float:
    """Seconds to the next try: 1, 2, 4 … 60, less up to a quarter so that workers do not march in step."""
    return min(_LONGEST_WAIT, 2.0 ** min(max(tries, 1) - 1, 10)) * secrets.SystemRandom().uniform(0.75, 1)


def _seconds(retry_after: str | None) -> float:
    """The wait Retry-After asks for: seconds or a date (RFC 9110, 10.2.3), at most an hour; else 0."""
    value = (retry_after or "").strip()
    if re.fullmatch(r"[0-9]{1,18}", value):
        return min(float(value), _LONGEST_ASKED)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return min(max((date - datetime.now(UTC)).total_seconds(), 0.0), _LONGEST_ASKED)


def _check_url(url: str) -> str:
    """The URL's scheme, host and port, which may be shown; its path may be a secret of its own."""
    import requests

    try:
        parts = urlsplit(url)
        port = parts.port
        requests.Request("POST", url).prepare()
    except (requests.RequestException, ValueError):
        parts, port = urlsplit(""), None
    if parts.scheme not in {"http", "https"} or not parts.hostname or re.search(r"[\x00-\x20\x7f]", url):
        raise ConfigurationError("the callback URL is no http:// or https:// address; check --callback-url")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")


def _key(secret: str) -> bytes:
    """The signing key in ``whsec_`` and base64. Checked here: the library skips what is no base64."""
    prefix, _, encoded = secret.strip().partition("_")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if prefix != "whsec" or not key:
        raise ConfigurationError("the callback secret is not whsec_ and base64; check --callback-secret")
    return key


def _check_token(token: str) -> str:
    token = token.strip()
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ConfigurationError("the callback token holds what no header can carry; check --callback-token")
    return token
