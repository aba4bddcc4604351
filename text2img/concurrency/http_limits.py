"""HTTP connections that give up in time, for requests and for other clients built on urllib3.

A socket's timeout starts again with every byte that arrives, so a server that trickles holds its client for
ever. Here every send and every receive of an exchange checks a limit, in the thread that waits: what is too
slow raises SlowTransfer there, and urllib3 closes the socket.

Imports urllib3, so import it only where requests are made.
"""

from __future__ import annotations

import http.client
import io
import math
import socket
import threading
import time
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from requests.adapters import HTTPAdapter
from urllib3 import ProxyManager
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.util.connection import create_connection

if TYPE_CHECKING:
    from collections.abc import Iterator

MIN_RATE: Final = 100_000
"""Bytes a second that a file must keep, on average over each RATE_PERIOD."""
RATE_PERIOD: Final = 60.0
"""Seconds over which the rate is averaged; also the time for an answer's status and headers."""
_SEND_BYTES: Final = 2**14
"""Bytes that are sent between two checks."""


class SlowTransfer(TimeoutError):  # noqa: N818 - named after the event
    """An exchange has used up its time, or a file comes too slowly. The message gives the limit."""


class Limit(Protocol):
    """What a client's exchanges may take."""

    def begin(self) -> Exchange:
        """Return the state of a new exchange."""
        ...


class Exchange(Protocol):
    """One request and its answer."""

    def left(self, *, sending: bool = False) -> float:
        """Return the seconds until the next check; raise SlowTransfer if the limit is exceeded.

        ``sending`` is True while connecting and while the request is sent.
        """
        ...

    def moved(self, count: int) -> None:
        """Count bytes that have been sent or received."""
        ...

    def asked(self) -> None:
        """Note that the whole request has been sent."""
        ...

    def answered(self) -> None:
        """Note that the status and all headers have been received."""
        ...


class TotalTime:
    """The limit of small exchanges: ``seconds`` for everything, from the name lookup to the last byte."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def begin(self) -> Exchange:
        """See Limit."""
        return _TimedExchange(self._seconds)


class _TimedExchange:
    def __init__(self, seconds: float) -> None:
        self._seconds, self._deadline = seconds, time.monotonic() + seconds

    def left(self, *, sending: bool = False) -> float:
        del sending
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise SlowTransfer(f"not done within {self._seconds:g} s")
        return left

    def moved(self, count: int) -> None:
        pass

    def asked(self) -> None:
        pass

    def answered(self) -> None:
        pass


class MinimumRate:
    """The limit of files: an average of MIN_RATE over each RATE_PERIOD, and one RATE_PERIOD for the headers.

    It begins when the request has been sent: uploads have the sockets' timeouts alone.
    The bytes of all connections with this limit count together: those that fetch one file in parts may share
    a slow line.
    """

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def begin(self) -> Exchange:
        """See Limit."""
        return _RatedExchange(self)

    def moved(self, count: int) -> None:
        """Count bytes that have been sent or received on any of the connections."""
        with self._lock:
            self.total += count


class _RatedExchange:
    def __init__(self, limit: MinimumRate) -> None:
        self._limit = limit
        self._until, self._total_before = math.inf, 0  # the present period
        self._headers_until = math.inf

    def left(self, *, sending: bool = False) -> float:
        if sending:
            return RATE_PERIOD
        now = time.monotonic()
        if now >= self._headers_until:
            raise SlowTransfer(f"no complete answer within {RATE_PERIOD:g} s")
        if now >= self._until:
            total = self._limit.total
            if total - self._total_before < MIN_RATE * RATE_PERIOD:
                raise SlowTransfer(f"less than {MIN_RATE // 1000} kB/s")
            self._until, self._total_before = now + RATE_PERIOD, total
        return min(self._until, self._headers_until) - now

    def moved(self, count: int) -> None:
        self._limit.moved(count)

    def asked(self) -> None:
        self._until = self._headers_until = time.monotonic() + RATE_PERIOD
        self._total_before = self._limit.total

    def answered(self) -> None:
        self._headers_until = math.inf


_exchange: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


@contextmanager
def _exchanging(exchange: Exchange) -> Iterator[None]:
    token = _exchange.set(exchange)
    try:
        yield
    finally:
        _exchange.reset(token)


class LimitedConnection:
    """Mixin for urllib3's connections: connect, send and receive within the exchange's limit."""

    def addresses(self: Any) -> list[str]:
        """Return the host's IP addresses, in the order in which they are tried."""
        host = self._dns_host.strip("[]")
        try:
            entries = socket.getaddrinfo(host, self.port, type=socket.SOCK_STREAM)
        except UnicodeError as exc:  # a label that is empty or too long
            raise socket.gaierror(socket.EAI_NONAME, "not a host name") from exc
        return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in entries))

    def _new_conn(self: Any) -> socket.socket:
        """Connect as urllib3 does, but to all of the host's addresses within the exchange's time."""
        try:
            addresses = self.addresses()
        except socket.gaierror as exc:
            raise NameResolutionError(self.host, self, exc) from exc
        last_error = OSError("no address")
        for address in addresses:
            try:
                return create_connection(
                    (address, self.port),
                    _within(self.timeout),
                    source_address=self.source_address,
                    socket_options=self.socket_options,
                )
            except OSError as exc:
                last_error = exc
                if isinstance(exc, SlowTransfer):
                    break
        if isinstance(last_error, TimeoutError):
            raise ConnectTimeoutError(self, f"Connection to {self.host} timed out.") from last_error
        raise NewConnectionError(self, f"Failed to connect to {self.host}: {last_error}") from last_error

    def send(self: Any, data: Any) -> None:
        """Send the data in pieces, each within what is left of the exchange's time."""
        if self.sock is None:
            self.connect()
        exchange = _exchange.get()
        if exchange is None or not isinstance(data, bytes | bytearray | memoryview):
            super().send(data)  # type: ignore[misc]
            return
        view = memoryview(data)
        for start in range(0, len(view), _SEND_BYTES):
            self.sock.settimeout(_within(self.timeout))
            piece = view[start : start + _SEND_BYTES]
            try:
                super().send(piece)  # type: ignore[misc]
            except TimeoutError:
                exchange.left(sending=True)  # raises, if it was its time that was up
                raise
            exchange.moved(len(piece))


def _within(timeout: float | None) -> float | None:
    """Return the timeout, or what is left of the present exchange if that is less."""
    exchange = _exchange.get()
    if exchange is None:
        return timeout
    left = exchange.left(sending=True)
    return left if timeout is None else min(timeout, left)


class LimitedResponse(http.client.HTTPResponse):
    """A response whose every receive is within the exchange's limit."""

    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._exchange = _exchange.get()
        if self._exchange is not None:
            self._exchange.asked()
            self.fp.close()
            self.fp = io.BufferedReader(_LimitedReader(sock, self._exchange), 2**16)

    def begin(self) -> None:
        """Read the status and the headers."""
        super().begin()
        if self._exchange is not None:
            self._exchange.answered()


class _LimitedReader(io.RawIOBase):
    """The receiving end of a socket, as ``socket.makefile`` makes it, with an exchange's limit."""

    def __init__(self, sock: Any, exchange: Exchange) -> None:
        self._sock, self._exchange = sock, exchange
        self._timeout: float | None = sock.gettimeout()
        self._file = sock.makefile("rb", buffering=0)  # keeps the socket open, until this is closed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        idle_since = time.monotonic()
        while True:
            left = self._exchange.left()
            if self._timeout is not None:
                left = min(left, idle_since + self._timeout - time.monotonic())
                if left <= 0:
                    raise TimeoutError("timed out")
            self._sock.settimeout(left)
            try:
                count = self._sock.recv_into(buffer)
            except TimeoutError:
                continue  # too slow, or nothing came for too long: the checks above decide
            self._exchange.moved(count)
            return int(count)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _HTTP(LimitedConnection, HTTPConnection):
    response_class = LimitedResponse


class _HTTPS(LimitedConnection, HTTPSConnection):
    response_class = LimitedResponse


class LimitedPool:
    """Mixin for urllib3's pools of LimitedConnections: each exchange has the ``limit``."""

    def __init__(self, *args: Any, limit: Limit, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limit = limit

    def urlopen(self, *args: Any, **kwargs: Any) -> Any:
        """Send a request and return the response, as urllib3 does."""
        with _exchanging(self._limit.begin()):
            return super().urlopen(*args, **kwargs)  # type: ignore[misc]


class _HTTPPool(LimitedPool, HTTPConnectionPool):
    ConnectionCls = _HTTP


class _HTTPSPool(LimitedPool, HTTPSConnectionPool):
    ConnectionCls = _HTTPS


class LimitedAdapter(HTTPAdapter):
    """A requests adapter whose exchanges have the ``limit``; ``pools`` are its pool classes by scheme."""

    def __init__(self, limit: Limit, pools: dict[str, Any] | None = None, **kwargs: Any) -> None:
        classes = pools or {"http": _HTTPPool, "https": _HTTPSPool}
        self._pools = {scheme: partial(pool, limit=limit) for scheme, pool in classes.items()}
        super().__init__(**kwargs)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Set up the pool manager as HTTPAdapter does, with limited connections."""
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        """Return the proxy's manager as HTTPAdapter does, with limited connections unless it is SOCKS."""
        manager = super().proxy_manager_for(*args, **kwargs)
        if type(manager) is ProxyManager:
            manager.pool_classes_by_scheme = self._pools  # type: ignore[assignment]
        return manager
