"""HTTP clients for the callback and for the prompts' own webhooks.

Webhook hosts below a wildcard are resolved once: the addresses are checked, then one of them is connected to.
Without a second lookup, DNS rebinding gains nothing.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from text2img.concurrency.http_limits import (
    LimitedAdapter,
    LimitedConnection,
    LimitedPool,
    LimitedResponse,
    TotalTime,
)
from text2img.concurrency.timeouts import run_with_timeout
from text2img.databases import Notification, webhook_id
from text2img.errors import ConfigurationError, PromptFailed
from text2img.prompts.ids import HostAllowlist, Webhook
from text2img.webhooks.delivery import (
    AddressRefused,
    DeliveryResult,
    DeliveryStatus,
    classify_response,
    describe_error,
    exponential_backoff,
)
from text2img.webhooks.payloads import Credentials

if TYPE_CHECKING:
    import requests

    from text2img.concurrency.http_limits import Limit
    from text2img.webhooks.progress import ProgressUpdate


_IETF_PROTOCOLS: Final = ipaddress.ip_network("192.0.0.0/24")
"""IETF protocol assignments: some Python versions count these addresses as global."""


class NoProxyAdapter(LimitedAdapter):
    """Adapter that ignores the environment's proxies: a proxy resolves names itself."""

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        """Send the request as HTTPAdapter does, without a proxy."""
        return super().send(request, *args, **{**kwargs, "proxies": None})


class PublicOnlyAdapter(NoProxyAdapter):
    """Adapter that connects to public addresses only.

    A host fails before anything is sent to it if any of its addresses is not public. TLS and the Host header
    are unaffected: the connection keeps the host's name.
    """

    def __init__(self, limit: Limit) -> None:
        super().__init__(limit, {"http": _HTTPPool, "https": _HTTPSPool})


def is_public(address: str) -> bool:
    """Return True if the IP address is public; an IPv4 address embedded in IPv6 is checked as IPv4."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.is_site_local:
            return False
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if embedded is not None:
            return is_public(str(embedded))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip in _IETF_PROTOCOLS)


class _PublicOnlyConnection(LimitedConnection):
    """Mixin for both kinds of connection: resolve the host, check its addresses, then connect to one."""

    def addresses(self: Any) -> list[str]:
        """Return the host's addresses; raise AddressRefused if there is none, or one that is not public."""
        addresses: list[str] = super().addresses()
        if not addresses or not all(map(is_public, addresses)):
            raise AddressRefused("has an address that is not public; name the host in --webhook-host")
        return addresses


class _HTTP(_PublicOnlyConnection, HTTPConnection):
    response_class = LimitedResponse


class _HTTPS(_PublicOnlyConnection, HTTPSConnection):
    response_class = LimitedResponse


class _HTTPPool(LimitedPool, HTTPConnectionPool):
    ConnectionCls = _HTTP


class _HTTPSPool(LimitedPool, HTTPSConnectionPool):
    ConnectionCls = _HTTPS


_log = logging.getLogger(__name__)


class CallbackClient:
    """Client that POSTs to the callback URL.

    ``secret`` (``whsec_…``) signs; ``token`` is sent as a bearer token. ``timeout``: seconds for one attempt,
    from name lookup to status line. Proxies and certificates come from the environment as usual, credentials
    never (no netrc). Safe to use from several threads. Raises ConfigurationError for an invalid URL, secret
    or token, without showing it.
    """

    def __init__(
        self, url: str, secret: str | None = None, token: str | None = None, timeout: float = 10.0
    ) -> None:
        self.timeout = timeout
        self.origin = _check_url(url)
        self._url = url
        self._credentials = Credentials(secret, token)

    def send(self, notification: Notification) -> DeliveryResult:
        """Send the notification once. Never raises; the response body is not read."""
        try:
            status, retry_after = run_with_timeout(
                self.timeout + 1, lambda: self._request("POST", notification)
            )
        except Exception as exc:  # noqa: BLE001 - whatever a receiver does, the run goes on
            _log.debug("callback %s failed: %s", notification.id, _error_types(exc))
            return DeliveryResult(
                DeliveryStatus.RETRY,
                describe_error(self.origin, exc, self.timeout),
                exponential_backoff(notification.tries),
            )
        return classify_response(self.origin, status, retry_after, notification.tries)

    def ping(self) -> DeliveryResult:
        """Check that the receiver answers, for ``doctor``: DELIVERED, or RETRY with the reason.

        Sends HEAD, which no receiver may take for a result (RFC 9110, 9.2.1), in the way of a POST: the same
        name lookup, proxy, certificate check and token. Any status below 500 will do, and 501, since few
        receivers support HEAD; so a wrong token or path is not detected.
        """
        try:
            status, _ = run_with_timeout(self.timeout + 1, lambda: self._request("HEAD", None))
        except Exception as exc:  # noqa: BLE001 - as above
            return DeliveryResult(DeliveryStatus.RETRY, describe_error(self.origin, exc, self.timeout))
        detail = f"{self.origin} answers ({status} to HEAD)"
        reachable = status < 500 or status == HTTPStatus.NOT_IMPLEMENTED
        return DeliveryResult(DeliveryStatus.DELIVERED if reachable else DeliveryStatus.RETRY, detail)

    def _request(self, method: str, notification: Notification | None) -> tuple[int, str | None]:
        """Return the response's status and its Retry-After header."""
        import requests

        body = None if notification is None else notification.body.encode()
        # A new session for each request: a kept connection that died since would cost an attempt.
        with requests.Session() as session:
            _mount(session, LimitedAdapter(TotalTime(self.timeout)))
            with session.request(
                method,
                self._url,
                data=body,
                headers=self._credentials.headers(notification),
                auth=self._authorize,
                timeout=self.timeout,
                allow_redirects=False,
                stream=True,
            ) as response:
                return response.status_code, response.headers.get("retry-after")

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Set our credentials. Passing an ``auth`` at all keeps requests from reading netrc."""
        parts = urlsplit(self._url)
        if self._credentials.token is not None:
            request.headers["Authorization"] = f"Bearer {self._credentials.token}"
        elif parts.username is not None:
            from requests.auth import HTTPBasicAuth
            from requests.utils import get_auth_from_url

            request = HTTPBasicAuth(*get_auth_from_url(self._url))(request)
        return request


def _error_types(exc: BaseException | None) -> str:
    """Return the types of the error and of its causes: their messages contain the URL's path."""
    types: list[str] = []
    while exc is not None and len(types) < 10:
        types.append(type(exc).__name__)
        exc = exc.__cause__ or exc.__context__
    return " from ".join(types)


def _mount(session: requests.Session, adapter: LimitedAdapter) -> None:
    session.mount("http://", adapter)
    session.mount("https://", adapter)


def _check_url(url: str) -> str:
    """Return the URL's scheme, host and port, which may be shown; its path may be a secret itself."""
    import requests

    try:
        parts = urlsplit(url)
        port = parts.port
        requests.Request("POST", url).prepare()
    except (requests.RequestException, ValueError):
        parts, port = urlsplit(""), None
    if parts.scheme not in {"http", "https"} or not parts.hostname or re.search(r"[\x00-\x20\x7f]", url):
        raise ConfigurationError("the callback URL is not an http:// or https:// URL; check --callback-url")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")


_DISALLOWED_HOST_WAIT: Final = 60.0
"""Seconds until the next attempt for a notification to a host that this run does not allow."""


class Webhooks:
    """Client for the prompts' own webhooks, on the allowed ``hosts`` only.

    It uses no proxy and follows no redirect. A host that is not listed by its exact name must have public
    addresses. ``timeout``: seconds for one attempt, from name lookup to status line. Safe to use from several
    threads.
    """

    def __init__(self, hosts: HostAllowlist, credentials: Credentials, timeout: float = 5.0) -> None:
        self.hosts = hosts
        self.timeout = timeout
        self._credentials = credentials

    def send(self, notification: Notification) -> DeliveryResult:
        """POST the notification once. Never raises; the response body is not read."""
        try:
            webhook = Webhook.of(notification.url)
        except PromptFailed:
            return DeliveryResult(DeliveryStatus.REJECTED, "the webhook URL is invalid")
        if not self.hosts.allows(webhook):
            detail = f"{webhook.origin} is not allowed by this run's --webhook-host"
            return DeliveryResult(DeliveryStatus.RETRY, detail, _DISALLOWED_HOST_WAIT)
        try:
            status, retry_after = self._request("POST", webhook, notification)
        except Exception as exc:  # noqa: BLE001 - whatever a receiver does, the run goes on
            _log.debug("webhook %s failed: %s", notification.id, _error_types(exc))
            return DeliveryResult(
                DeliveryStatus.RETRY,
                describe_error(webhook.origin, exc, self.timeout),
                exponential_backoff(notification.tries),
            )
        return classify_response(webhook.origin, status, retry_after, notification.tries)

    def progress(self, address: str, generation_id: str, update: ProgressUpdate) -> None:
        """PATCH one progress update once; the id is JSON. Never raises: it is not retried."""
        document = {
            "generation_id": json.loads(generation_id),
            "progress": {
                "current_step": update.step,
                "total_steps": update.total_steps,
                "progress_percent": update.percent,
                "estimated_seconds": update.seconds_left,
            },
        }
        webhook = Webhook.of(address)
        notification = Notification(
            id=webhook_id(), run_id="", body=json.dumps(document), url=webhook.to("progress")
        )
        try:
            status, _ = self._request("PATCH", webhook, notification)
        except Exception as exc:  # noqa: BLE001 - as above
            _log.debug("progress of %s: %s", generation_id, describe_error(webhook.origin, exc, self.timeout))
            return
        if not 200 <= status < 300:
            _log.debug("progress of %s: %s answered %d", generation_id, webhook.origin, status)

    def _request(self, method: str, webhook: Webhook, notification: Notification) -> tuple[int, str | None]:
        return run_with_timeout(self.timeout + 1, lambda: self._exchange(method, webhook, notification))

    def _exchange(self, method: str, webhook: Webhook, notification: Notification) -> tuple[int, str | None]:
        """Return the response's status and its Retry-After header."""
        import requests

        with requests.Session() as session:
            kind = NoProxyAdapter if self.hosts.is_exact(webhook) else PublicOnlyAdapter
            _mount(session, kind(TotalTime(self.timeout)))
            with session.request(
                method,
                str(notification.url),
                data=notification.body.encode(),
                headers={**self._credentials.headers(notification), "X-Request-Source": "inference-server"},
                auth=self._authorize,
                timeout=self.timeout,
                allow_redirects=False,
                stream=True,
            ) as response:
                return response.status_code, response.headers.get("retry-after")

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Set the token. Passing an ``auth`` at all keeps requests from reading netrc."""
        if self._credentials.token is not None:
            request.headers["Authorization"] = f"Bearer {self._credentials.token}"
        return request
