"""Who is told of a run's results: one POST, signed. Knows HTTP, and nothing of databases."""

from __future__ import annotations

import logging
import re
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from text2img.concurrency.timeouts import within
from text2img.errors import ConfigurationError
from text2img.webhooks.responses import Result, Verdict, fault, growing, judge
from text2img.webhooks.signing import Credentials

if TYPE_CHECKING:
    import requests

    from text2img.databases import Notice

_log = logging.getLogger(__name__)


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
        self._credentials = Credentials(secret, token)

    def send(self, notice: Notice) -> Verdict:
        """Try once. Never raises; the answer's body is not read."""
        try:
            status, retry_after = within(self.timeout + 1, lambda: self._request("POST", notice))
        except Exception as exc:  # noqa: BLE001 - whatever a receiver does, the run goes on
            _log.debug("callback %s failed", notice.id, exc_info=not isinstance(exc, TimeoutError))
            return Verdict(Result.LATER, fault(self.shown, exc, self.timeout), growing(notice.tries))
        return judge(self.shown, status, retry_after, notice.tries)

    def ping(self) -> Verdict:
        """Whether somebody answers there, for ``doctor``: TOLD, or LATER with the reason.

        Sends HEAD, which no receiver may take for a result (RFC 9110, 9.2.1), by the way that a POST takes:
        the same name lookup, proxy, certificate check and token. Any answer below 500 will do, and 501, since
        few receivers know HEAD; so a wrong token or path is not found out.
        """
        try:
            status, _ = within(self.timeout + 1, lambda: self._request("HEAD", None))
        except Exception as exc:  # noqa: BLE001 - as above
            return Verdict(Result.LATER, fault(self.shown, exc, self.timeout))
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
                headers=self._credentials.headers(notice),
                auth=self._authorize,
                timeout=self.timeout,
                allow_redirects=False,
                stream=True,
            ) as response,
        ):
            return response.status_code, response.headers.get("retry-after")

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Set the credentials that are ours. That this is given at all keeps requests from reading netrc."""
        parts = urlsplit(self._url)
        if self._credentials.token is not None:
            request.headers["Authorization"] = f"Bearer {self._credentials.token}"
        elif parts.username is not None:
            from requests.auth import HTTPBasicAuth
            from requests.utils import get_auth_from_url

            request = HTTPBasicAuth(*get_auth_from_url(self._url))(request)
        return request


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
