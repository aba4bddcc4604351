"""Exchanges with servers that are too slow: they end in time, and their sockets are closed."""

from __future__ import annotations

import gzip
import socket
import ssl
import threading

import pytest
import requests
from werkzeug import Response

from tests.servers import free_port
from tests.servers.slow import BODY, HEADERS, slow_server
from tests.unit.engine.test_hosted_protocol import certificate  # noqa: F401 - a fixture
from tests.waiting import until
from text2img.concurrency import http_limits
from text2img.concurrency.http_limits import LimitedAdapter, MinimumRate, SlowTransfer, TotalTime
from text2img.concurrency.timeouts import timeout_in

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def limits(monkeypatch):
    """Sets a limit of files."""

    def limit(name, value):
        monkeypatch.setattr(http_limits, name, value)

    limit("RATE_PERIOD", 0.3)
    return limit


def read(url, limit, *, data=None, verify=True, timeout=60):
    """The whole answer."""
    with requests.Session() as session:
        session.trust_env = False
        for scheme in ("http://", "https://"):
            session.mount(scheme, LimitedAdapter(limit))
        method = "GET" if data is None else "POST"
        with session.request(method, url, data=data, stream=True, timeout=timeout, verify=verify) as response:
            return b"".join(response.iter_content(2**16))


def given_up(url, limit, **options):
    """The reason why an exchange was given up."""
    with pytest.raises(requests.RequestException) as caught:
        read(url, limit, **options)
    timeout = timeout_in(caught.value)
    assert isinstance(timeout, SlowTransfer), timeout
    return str(timeout)


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"", b"H"),
        (HEADERS, b"x"),
        (b"HTTP/1.1 200 OK\r\n", b"X-Many: y\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (BODY, b"x"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        (CHUNKED, b"1\r\nx\r\n"),
        (CHUNKED + b"5;", b"x"),
    ],
)
@pytest.mark.parametrize("limit", [TotalTime(0.3), MinimumRate()], ids=["total", "rate"])
def test_what_trickles_is_given_up(limits, start, piece, limit):
    """Wherever an answer trickles, in status, headers, body or chunks, it ends and its socket is closed."""
    with slow_server(start, piece) as server:
        reason = given_up(server.url, limit)
        until(lambda: server.closed == server.connections == 1)
    assert "0.3 s" in reason or reason == "less than 100 kB/s"


@pytest.mark.parametrize("start", [HEADERS, BODY])
def test_what_trickles_over_tls_is_given_up(limits, certificate, start):  # noqa: F811 - the fixture
    """The same over TLS, where each piece is a record of its own."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with slow_server(start, tls=tls) as server:
        given_up(server.url, TotalTime(0.5), verify=str(certificate))
        until(lambda: server.closed == server.connections == 1)


def test_headers_that_flood_are_given_up(limits):
    """Interim answers without an end are given up, however fast they come."""
    limits("MIN_RATE", 1)
    with slow_server(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100) as server:
        assert "no complete answer" in given_up(server.url, MinimumRate())


def test_a_receiver_that_does_not_read_is_given_up():
    """A request that is not taken ends as well."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/"
        assert given_up(url, TotalTime(0.3), data=bytes(2**26)) == "not done within 0.3 s"


def test_a_file_at_the_rate_is_read_whole(limits, httpserver):
    """What keeps the rate is read however many periods it takes; periods start again for each answer."""
    limits("MIN_RATE", 1000)
    go = threading.Event()
    parts = [b"x" * 1000] * 20

    def pieces():
        for part in parts:
            yield part
            go.wait(0.1)  # clock: the file has to take several periods

    httpserver.expect_request("/").respond_with_handler(
        lambda _: Response(pieces(), headers={"Content-Length": "20000"})
    )
    assert read(httpserver.url_for("/"), MinimumRate()) == b"".join(parts)


def test_connections_of_one_file_count_together(limits):
    """One that rests is not given up while the others of its limit bring enough."""
    limits("MIN_RATE", 1000)
    limit = MinimumRate()
    resting, brings = limit.begin(), limit.begin()
    resting.asked()
    resting.answered()
    for period in range(5):
        brings.moved(100 * (period + 3))
        until(lambda: resting.left() < 0.1)
    limits("MIN_RATE", 10**9)
    with pytest.raises(SlowTransfer):
        until(lambda: resting.left() < 0)


def test_ordinary_errors_stay_what_they_are():
    """A refused connection, a name without an address and a silent server fail as requests says."""
    with pytest.raises(requests.ConnectionError, match="refused"):
        read(f"http://127.0.0.1:{free_port()}/", MinimumRate())
    for host in ("nowhere.invalid", "a..b", "a" * 64 + ".invalid"):
        with pytest.raises(requests.RequestException) as caught:
            read(f"http://{host}/", MinimumRate())
        assert timeout_in(caught.value) is None
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(requests.ReadTimeout):
        read(f"http://127.0.0.1:{silent.getsockname()[1]}/", MinimumRate(), timeout=0.2)


def test_answers_arrive_whole_over_kept_connections(httpserver):
    """Compressed, chunked and empty answers are the same as without limits, one after the other."""
    body = bytes(range(256)) * 1000
    packed = {"Content-Encoding": "gzip"}
    httpserver.expect_request("/packed").respond_with_data(gzip.compress(body), headers=packed)
    httpserver.expect_request("/empty").respond_with_data(b"", status=204)
    httpserver.expect_request("/plain").respond_with_data(body)
    with requests.Session() as session:
        session.mount("http://", LimitedAdapter(TotalTime(60)))
        contents = [session.get(httpserver.url_for(path)).content for path in ("/packed", "/empty", "/plain")]
    assert contents == [body, b"", body]
