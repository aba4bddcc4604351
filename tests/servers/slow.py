"""A server on loopback that sends slowly and without end, as some do."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

HEADERS = b"HTTP/1.1 200 OK\r\nX-Slow: "
"""The start of an answer whose headers do not end."""
BODY = b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n"
"""The start of an answer with a large file."""


class SlowServer:
    """Answers every connection with ``start`` and then one piece after the other.

    ``connections`` counts those that were opened, ``closed`` those that the client has closed.
    """

    def __init__(
        self, start: bytes, piece: bytes = b"x", pause: float = 0.02, *, tls: ssl.SSLContext | None = None
    ) -> None:
        self._start, self._piece, self._pause, self._tls = start, piece, pause, tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self.connections = self.closed = 0
        self.port = self._listener.getsockname()[1]

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/"

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                thread = threading.Thread(target=self._answer, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _answer(self, connection: socket.socket) -> None:
        try:
            if self._tls:
                connection = self._tls.wrap_socket(connection, server_side=True)
            with connection:
                connection.recv(65536)
                connection.sendall(self._start)
                while not self._over.wait(self._pause):  # clock: a server that trickles has to be slow
                    connection.sendall(self._piece)
        except OSError:
            self.closed += 1

    def close(self) -> None:
        self._over.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()


@contextmanager
def slow_server(
    start: bytes, piece: bytes = b"x", pause: float = 0.02, *, tls: ssl.SSLContext | None = None
) -> Iterator[SlowServer]:
    """Run a SlowServer within the block."""
    server = SlowServer(start, piece, pause, tls=tls)
    thread = threading.Thread(target=server.accept, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()
