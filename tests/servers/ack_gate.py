"""A gate before RabbitMQ, through which everything passes but acknowledgements, if those shall not."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager, suppress

_GREETING = 8  # bytes that a client begins with, before its first frame
_ACK = (1).to_bytes(1), (60).to_bytes(2) + (80).to_bytes(2)
_HEARTBEAT = (8).to_bytes(1)


class AckGate:
    """Its ``port``; ``reached``, set once a client has said that it has a message safely, which the server
    hears only if that ``passes``; and how many ``heartbeats`` came from clients.
    """

    def __init__(self, port, *, passes):
        self._behind, self._passes = port, passes
        self.reached = threading.Event()
        self.heartbeats = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open = [self._listener]

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._behind))
                self._open += [client, server]
                for work in ((self._pass_on, server, client), (self._watch, client, server)):
                    threading.Thread(target=work[0], args=work[1:], daemon=True).start()

    def _pass_on(self, source, target):
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        _end(target)

    def _watch(self, client, server):
        with suppress(OSError), client.makefile("rb") as frames:
            server.sendall(frames.read(_GREETING))
            while head := frames.read(7):
                rest = frames.read(int.from_bytes(head[3:]) + 1)
                if (head[:1], rest[:4]) == _ACK:
                    self.reached.set()
                    if not self._passes:
                        continue
                self.heartbeats += head[:1] == _HEARTBEAT
                server.sendall(head + rest)
        _end(server)

    def close(self):
        for each in self._open:
            _end(each)


def _end(sock):
    """Close the connection: without the shutdown it would stay open while another thread reads from it."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


@contextmanager
def ack_gate(port, *, passes=False):
    """A gate before whoever listens on that port, for as long as the block lasts; see AckGate."""
    gate = AckGate(port, passes=passes)
    thread = threading.Thread(target=gate._accept, daemon=True)
    thread.start()
    try:
        yield gate
    finally:
        gate.close()
        thread.join()
