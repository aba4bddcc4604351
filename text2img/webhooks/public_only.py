"""A way to a host whose addresses are checked first, and then connected to: no second lookup in between.

So a name that leads elsewhere the next moment (DNS rebinding) gains nothing. Knows addresses, no webhooks.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING, Any, Final

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util.connection import create_connection

from text2img.webhooks.responses import AddressRefused

if TYPE_CHECKING:
    import requests

_PROTOCOLS: Final = ipaddress.ip_network("192.0.0.0/24")
"""IETF protocol assignments: not all Pythons know that these are not global."""


class Direct(HTTPAdapter):
    """Goes straight to the host, whatever proxies the environment names: a proxy looks names up itself."""

    def send(self, request: requests.PreparedRequest, *arguments: Any, **named: Any) -> requests.Response:
        """As HTTPAdapter, by no proxy."""
        return super().send(request, *arguments, **{**named, "proxies": None})


class Public(Direct):
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
        fault: OSError | None = None
        for address in addresses:
            try:
                return create_connection(
                    (address, self.port), self.timeout, socket_options=self.socket_options
                )
            except OSError as exc:
                fault = exc
        raise fault or OSError("no address")


class _HTTP(_Checked, HTTPConnection):
    pass


class _HTTPS(_Checked, HTTPSConnection):
    pass


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = _HTTP


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _HTTPS
