"""A way to a host whose addresses are checked first, and then connected to: no second lookup in between.

So a name that leads elsewhere the next moment (DNS rebinding) gains nothing. Knows addresses, no webhooks.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import socket
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util.connection import create_connection

from text2img.concurrency.timeouts import run_with_timeout
from text2img.databases import Notification, webhook_id
from text2img.errors import ConfigurationError, PromptFailed
from text2img.prompts.webhook_urls import HostAllowlist, Webhook
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

    from text2img.webhooks.progress import ProgressUpdate


_PROTOCOLS: Final = ipaddress.ip_network("192.0.0.0/24")
"""IETF protocol assignments: not all Pythons know that these are not global."""


class NoProxyAdapter(HTTPAdapter):
    """Goes straight to the host, whatever proxies the environment names: a proxy looks names up itself."""

    def send(self, request: requests.PreparedRequest, *arguments: Any, **named: Any) -> requests.Response:
        """As HTTPAdapter, by no proxy."""
        return super().send(request, *arguments, **{**named, "proxies": None})


class PublicOnlyAdapter(NoProxyAdapter):
    """Goes to public addresses alone: a host any of whose addresses is another fails, before it is sent
    anything. TLS and the Host header are as ever, since the name stays the connection's.
    """

    def init_poolmanager(self, *arguments: Any, **named: Any) -> None:
        """As HTTPAdapter, with our connections."""
        super().init_poolmanager(*arguments, **named)
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}


def is_public(address: str) -> bool:
    """Whether an IP address may be anybody's on the Internet, also where it carries one of IPv4 in it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.is_site_local:
            return False
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip in _PROTOCOLS)


class _Checked:
    """What both kinds of connection do instead of looking the host up while they connect."""

    def _new_conn(self: Any) -> socket.socket:
        found = socket.getaddrinfo(self._dns_host, self.port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
        if not addresses or not all(map(is_public, addresses)):
            raise AddressRefused("leads to an address that is not public; name the host in --webhook-host")
        describe_error: OSError | None = None
        for address in addresses:
            try:
                return create_connection(
                    (address, self.port), self.timeout, socket_options=self.socket_options
                )
            except OSError as exc:
                describe_error = exc
        raise describe_error or OSError("no address")


class _HTTP(_Checked, HTTPConnection):
    pass


class _HTTPS(_Checked, HTTPSConnection):
    pass


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = _HTTP


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _HTTPS


_log = logging.getLogger(__name__)


class CallbackClient:
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

    def send(self, notification: Notification) -> DeliveryResult:
        """Try once. Never raises; the answer's body is not read."""
        try:
            status, retry_after = run_with_timeout(
                self.timeout + 1, lambda: self._request("POST", notification)
            )
        except Exception as exc:  # noqa: BLE001 - whatever a receiver does, the run goes on
            _log.debug("callback %s failed", notification.id, exc_info=not isinstance(exc, TimeoutError))
            return DeliveryResult(
                DeliveryStatus.RETRY,
                describe_error(self.shown, exc, self.timeout),
                exponential_backoff(notification.tries),
            )
        return classify_response(self.shown, status, retry_after, notification.tries)

    def ping(self) -> DeliveryResult:
        """Whether somebody answers there, for ``doctor``: TOLD, or LATER with the reason.

        Sends HEAD, which no receiver may take for a result (RFC 9110, 9.2.1), by the way that a POST takes:
        the same name lookup, proxy, certificate check and token. Any answer below 500 will do, and 501, since
        few receivers know HEAD; so a wrong token or path is not found out.
        """
        try:
            status, _ = run_with_timeout(self.timeout + 1, lambda: self._request("HEAD", None))
        except Exception as exc:  # noqa: BLE001 - as above
            return DeliveryResult(DeliveryStatus.RETRY, describe_error(self.shown, exc, self.timeout))
        detail = f"{self.shown} answers ({status} to HEAD)"
        answers = status < 500 or status == HTTPStatus.NOT_IMPLEMENTED
        return DeliveryResult(DeliveryStatus.DELIVERED if answers else DeliveryStatus.RETRY, detail)

    def _request(self, method: str, notification: Notification | None) -> tuple[int, str | None]:
        """The answer's status and its Retry-After."""
        import requests

        body = None if notification is None else notification.body.encode()
        with (
            # A session of its own: a kept connection that has died in between would cost a try.
            requests.Session() as session,
            session.request(
                method,
                self._url,
                data=body,
                headers=self._credentials.headers(notification),
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


_NOT_HERE: Final = 60.0
"""Seconds until a notice to a host that this run may not tell is looked at again."""


class Webhooks:
    """Sends to ``hosts`` alone, by no proxy, following no redirect; a host that is not named exactly must
    have public addresses. ``timeout``: seconds for one try, from name lookup to status line. Safe to use from
    several threads.
    """

    def __init__(self, hosts: HostAllowlist, credentials: Credentials, timeout: float = 5.0) -> None:
        self.hosts = hosts
        self.timeout = timeout
        self._credentials = credentials

    def send(self, notification: Notification) -> DeliveryResult:
        """POST a notice, once. Never raises; the answer's body is not read."""
        try:
            webhook = Webhook.of(notification.url)
        except PromptFailed:
            return DeliveryResult(DeliveryStatus.REJECTED, "the webhook's address is none")
        if not self.hosts.allows(webhook):
            detail = f"{webhook.origin} is no host that --webhook-host names in this run"
            return DeliveryResult(DeliveryStatus.RETRY, detail, _NOT_HERE)
        try:
            status, retry_after = self._request("POST", webhook, notification)
        except Exception as exc:  # noqa: BLE001 - whatever a receiver does, the run goes on
            _log.debug("webhook %s failed", notification.id, exc_info=not isinstance(exc, TimeoutError))
            return DeliveryResult(
                DeliveryStatus.RETRY,
                describe_error(webhook.origin, exc, self.timeout),
                exponential_backoff(notification.tries),
            )
        return classify_response(webhook.origin, status, retry_after, notification.tries)

    def progress(self, address: str, generation_id: str, reached: ProgressUpdate) -> None:
        """PATCH one milestone, once. Never raises: it is not tried again."""
        document = {
            "generation_id": generation_id,
            "progress": {
                "current_step": reached.step,
                "total_steps": reached.of,
                "progress_percent": reached.percent,
                "estimated_seconds": reached.left,
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
        """The answer's status and its Retry-After."""
        import requests

        with requests.Session() as session:
            way = NoProxyAdapter() if self.hosts.is_exact(webhook) else PublicOnlyAdapter()
            session.mount("http://", way)
            session.mount("https://", way)
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
        """Set the token. That this is given at all keeps requests from reading netrc."""
        if self._credentials.token is not None:
            request.headers["Authorization"] = f"Bearer {self._credentials.token}"
        return request
