"""The proxy that puts a distance before a server."""

from __future__ import annotations

import asyncio
import socket
import socketserver
import threading
from contextlib import contextmanager

from benchmarks.distance import distance
from tests.waiting import until


class _Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)


@contextmanager
def _server(handler=_Echo):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_an_answer_takes_the_way_there_and_back():
    """A message and its answer each take half of the distance's time, each time."""
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    with (
        _server() as port,
        distance(port, 0.2, clock=lambda: 5.0, sleep=sleep) as far,
        socket.create_connection(("127.0.0.1", far)) as client,
    ):
        for answers in (1, 2):
            client.sendall(b"hello")
            assert client.recv(5) == b"hello"
            assert pauses == [5.1 - 5.0] * 2 * answers


class _Held:
    """A clock that stands still, and a sleep of which the first one lasts until ``release`` is set.

    ``read`` counts how often the clock was asked for something else than a pause: once for each message that
    the proxy has read.
    """

    def __init__(self):
        self.pauses, self.release, self._now, self._asked = [], threading.Event(), 0.0, 0

    def clock(self):
        self._asked += 1
        return self._now

    @property
    def read(self):
        return self._asked - len(self.pauses)

    async def sleep(self, seconds):
        self.pauses.append(seconds)
        if len(self.pauses) == 1:
            await asyncio.to_thread(self.release.wait)
            self._now += seconds


def test_what_is_under_way_does_not_wait_for_what_is_ahead():
    """Messages that are sent while the first is under way are read, and arrive with it, in order; so does the
    end: all of them take the time of one.
    """
    arrived, held = [], _Held()

    class Sink(socketserver.BaseRequestHandler):
        def handle(self):
            while data := self.request.recv(65536):
                arrived.append(data)
            arrived.append("the end")

    with (
        _server(Sink) as port,
        distance(port, 1.0, clock=held.clock, sleep=held.sleep) as far,
        socket.create_connection(("127.0.0.1", far)) as client,
    ):
        for number in range(10):
            client.sendall(bytes([number]))
            until(lambda number=number: held.pauses and held.read == number + 1)
        client.shutdown(socket.SHUT_WR)
        until(lambda: held.read == 11)
        assert (arrived, held.pauses) == ([], [0.5])
        held.release.set()
        until(lambda: "the end" in arrived)
    assert b"".join(arrived[:-1]) == bytes(range(10))
    assert held.pauses[:11] == [0.5] + [0.0] * 10


def test_much_arrives_whole_and_in_order():
    """Many bytes come back as they were sent, and their end comes too."""
    sent = bytes(range(256)) * 20_000
    with (
        _server() as port,
        distance(port, 0.0) as far,
        socket.create_connection(("127.0.0.1", far)) as client,
    ):
        threading.Thread(target=lambda: (client.sendall(sent), client.shutdown(socket.SHUT_WR))).start()
        with client.makefile("rb") as answer:
            assert answer.read() == sent
