"""A callback's receiver that remembers what it was told, and can hold an answer back."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.chaos.gates import Catch


@dataclass(frozen=True)
class Told:
    """One POST; ``answered`` with 200, or never."""

    id: str
    body: bytes
    answered: bool

    @property
    def says(self):
        return json.loads(self.body)


class Listener:
    """Listens on a free loopback port between ``with`` and its end."""

    def __init__(self):
        handler = type("Handler", (_Handler,), {"listener": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/told"
        self.told, self.catch = [], None

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def catching(self, run_id):
        """The next POST about that run is read and never answered."""
        self.catch = Catch(lambda body: json.loads(body)["run_id"] == run_id, reply=False)
        try:
            yield self.catch
        finally:
            catch, self.catch = self.catch, None
            catch.let_go(through=False)


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        catch = self.listener.catch
        answers = not (catch and catch.takes(body))
        self.listener.told.append(Told(self.headers["webhook-id"], body, answers))
        if not answers:
            catch.hold()
            return
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
