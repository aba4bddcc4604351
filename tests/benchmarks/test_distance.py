"""The proxy that puts a distance before a server."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from contextlib import contextmanager

from benchmarks.distance import distance


class _Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)


@contextmanager
def _echo():
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_an_answer_takes_the_way_there_and_back():
    """A message and its answer take the distance's time, each time."""
    with _echo() as port, distance(port, 0.2) as far, socket.create_connection(("127.0.0.1", far)) as client:
        for _ in range(2):
            begun = time.monotonic()
            client.sendall(b"hello")
            assert client.recv(5) == b"hello"
            assert time.monotonic() - begun >= 0.2


def test_what_is_under_way_does_not_wait_for_what_is_ahead():
    """Many messages at once take the time of one, arrive whole and in order, and their end arrives too."""
    sent = bytes(range(256)) * 20_000
    with _echo() as port, distance(port, 1.0) as far, socket.create_connection(("127.0.0.1", far)) as client:
        begun = time.monotonic()
        threading.Thread(target=lambda: (client.sendall(sent), client.shutdown(socket.SHUT_WR))).start()
        with client.makefile("rb") as answer:
            assert answer.read() == sent
        assert 1.0 <= time.monotonic() - begun < 1.0 * len(sent) / 65_536
