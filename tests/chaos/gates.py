"""A TCP proxy before a server, that holds back the message at which a worker shall die.

Knows how messages are framed in MongoDB's wire protocol and in HTTP, and nothing of what they mean: that
is said by whoever sets a catch.
"""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager, suppress

import bson

_OP_MSG = 2013


class Catch:
    """Waits for the ``nth`` message that is recognised, and holds it, or its reply, back.

    ``reached`` is set when the request is held before the server, or when the server has answered it and
    the answer is held: then all that the server does for it is done. ``answered`` is set when a request
    that was held and then let through has its answer.
    """

    def __init__(self, recognises, *, reply, nth=1):
        self.reply = reply
        self.reached, self.answered, self._over = threading.Event(), threading.Event(), threading.Event()
        self._recognises, self._left, self._lock = recognises, nth, threading.Lock()
        self._let_through = False

    def takes(self, message):
        """Whether this is the message."""
        if not self._recognises(message):
            return False
        with self._lock:
            self._left -= 1
            return self._left == 0

    def hold(self):
        """Wait until it is over; whether what was held goes on to where it was going."""
        self.reached.set()
        self._over.wait()
        return self._let_through

    def let_go(self, *, through):
        """It is over: what was held goes through, or is dropped with its connection. Said once for all."""
        if not self._over.is_set():
            self._let_through = through
            self._over.set()


class Gate:
    """A proxy on a free loopback port for a server at ``port``; ``read`` reads one message of a client.

    ``missed`` is set once a client has tried to connect while the server was away.
    """

    def __init__(self, port, read):
        self._target, self._read, self._catches = ("127.0.0.1", port), read, []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._sockets = []
        self._away = None
        self.missed = threading.Event()

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc):
        for each in (self._listening, *self._sockets):
            _close(each)

    @contextmanager
    def catching(self, recognises, *, reply, nth=1):
        """A catch that is set for the time of the block; what it then still holds is dropped."""
        catch = Catch(recognises, reply=reply, nth=nth)
        self._catches = [*self._catches, catch]
        try:
            yield catch
        finally:
            self._catches = [each for each in self._catches if each is not catch]
            catch.let_go(through=False)

    @contextmanager
    def away(self, *, silent=False):
        """The server is not there: connections break and new ones are refused, or get no answer."""
        self._away = "silent" if silent else "refusing"
        gone, self._sockets = self._sockets, []
        for each in gone:
            _close(each)
        try:
            yield
        finally:
            self._away = None

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                if self._away:
                    self.missed.set()
                if self._away == "refusing":
                    client.close()
                    continue
                if self._away == "silent":
                    self._sockets.append(client)
                    continue
                server = socket.create_connection(self._target)
                for each in (client, server):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets += [client, server]
                _Connection(self, client, server, self._read).start()

    def catch_of(self, message):
        """The catch that this message is for, if any."""
        return next((catch for catch in self._catches if catch.takes(message)), None)


class _Connection:
    """One client's connection: requests one way, answers the other, until either side ends it."""

    def __init__(self, gate, client, server, read):
        self._gate, self._client, self._server, self._read = gate, client, server, read
        self._caught = None

    def start(self):
        for work in (self._requests, self._replies):
            threading.Thread(target=self._pump, args=(work,), daemon=True).start()

    def _pump(self, work):
        with suppress(OSError, ValueError):
            work()
        _close(self._client)
        _close(self._server)

    def _requests(self):
        with self._client.makefile("rb") as stream:
            while message := self._read(stream):
                catch = self._gate.catch_of(message)
                if catch and not catch.reply and not catch.hold():
                    return
                self._caught = catch
                self._server.sendall(message)

    def _replies(self):
        while data := self._server.recv(65536):
            caught = self._caught
            if caught and caught.reply and not caught.hold():
                return
            if caught:
                caught.answered.set()
            self._client.sendall(data)


def wire_message(stream):
    """One message of MongoDB's wire protocol; empty at the end."""
    head = stream.read(16)
    return head + stream.read(int.from_bytes(head[:4], "little") - 16) if len(head) == 16 else b""


def http_message(stream):
    """One HTTP request with a body of known length; empty at the end."""
    lines = []
    while (line := stream.readline()) not in {b"\r\n", b""}:
        lines.append(line)
    if not line:
        return b""
    lengths = [each.split(b":")[1] for each in lines if each.lower().startswith(b"content-length:")]
    return b"".join([*lines, line]) + stream.read(int(lengths[0]) if lengths else 0)


def command_of(message):
    """The command in a message of MongoDB's wire protocol, its lists of documents in place."""
    if int.from_bytes(message[12:16], "little") != _OP_MSG:
        return {}
    command, at = {}, 20
    while at + 5 <= len(message):
        start, size = at + 1, int.from_bytes(message[at + 1 : at + 5], "little")
        section = message[start : start + size]
        if message[at] == 0:
            command |= bson.decode(section)
        else:
            name, _, documents = section[4:].partition(b"\0")
            command[name.decode()] = bson.decode_all(documents)
        at = start + size
    return command


def _close(sock):
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
