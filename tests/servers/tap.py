"""A server before another one that sees what is asked for, and can hold it back, refuse it or spoil it."""

from __future__ import annotations

import http.client
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Tap:
    """What becomes of requests that read an object whose name holds ``about``.

    ``status`` is answered instead, where it is set; ``spoiled`` turns a bit of what is read;
    until ``open`` is set they wait. ``reached`` is set by the first of them; ``read`` has the names of all
    objects that were read.
    """

    def __init__(self, url):
        self.target = urlsplit(url).netloc
        self.about, self.status, self.spoiled = "unet/diffusion", None, False
        self.reached, self.open = threading.Event(), threading.Event()
        self.open.set()
        self.read = []


@contextmanager
def tapped(url, handler=None):
    """A Tap before that server, with its own ``url``, for as long as the block lasts."""
    tap = Tap(url)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Tapped", (handler or Handler,), {"tap": tap}))
    server.daemon_threads = True
    tap.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield tap
    finally:
        tap.open.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """Forwards what it is asked, through its ``tap``."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_GET(self):
        tap, name = self.tap, unquote(urlsplit(self.path).path)
        about = False
        if self.command == "GET" and self.headers.get("Range"):
            tap.read.append(name.partition("models/")[2])
            about = tap.about in name
        if about:
            tap.reached.set()
            tap.open.wait(60)
        status, headers, body = self._forwarded()
        if about and tap.spoiled:
            body = body[:100] + bytes([body[100] ^ 1]) + body[101:]
        if about and tap.status:
            status, headers, body = tap.status, [], b""
        self._answer(status, headers, body)

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET  # noqa: N815 - http.server's names

    def _forwarded(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        connection = http.client.HTTPConnection(self.tap.target, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status, headers, body):
        self.send_response(status)
        skipped = {"transfer-encoding", "connection", "server", "date"}
        skipped |= set() if self.command == "HEAD" else {"content-length"}
        for header, value in headers:
            if header.lower() not in skipped:
                self.send_header(header, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
