"""Cloud Storage for tests: gcp-storage-emulator, behind a gate that keeps the preconditions it ignores."""

from __future__ import annotations

import http.client
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

from tests.servers import free_port, running

_NAME = re.compile(rb'"name": *"((?:[^"\\]|\\.)*)"')
_OBJECT = re.compile(r"/o/([^/?]+)$")


@dataclass(frozen=True)
class GcsServer:
    """Where it listens (for STORAGE_EMULATOR_HOST), and the bucket that is there."""

    host: str
    bucket: str = "pictures"


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory):
    """A Cloud Storage server of this test session, in a throwaway folder."""
    with gcs_in(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@contextmanager
def gcs_in(folder):
    """A server that keeps its data in that folder, for as long as the block lasts."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    listen = ["-H", "127.0.0.1", "--port", str(port), "--default-bucket", GcsServer.bucket, "-q"]
    arguments = ["-d", str(folder / "data"), "start", *listen]
    with running("gcp-storage-emulator", arguments, folder, lambda: _answers(port)), _gate(port) as host:
        yield GcsServer(host)


@pytest.fixture
def gcs(gcs_server, monkeypatch):
    """The session's Cloud Storage server, which Google's client in this process then talks to."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.host)
    return gcs_server


def _answers(port):
    try:
        return _ask(port, "GET", "/")[0] == 200
    except OSError:
        return False


def _ask(port, method, target, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, target, body, headers or {})
        response = connection.getresponse()
        return response.status, response.getheaders(), response.read()
    finally:
        connection.close()


class _gate:  # noqa: N801 - used as a context manager only
    """A server before the emulator that answers 412 where ifGenerationMatch does not match, as Google's."""

    def __init__(self, port):
        handler = type("Handler", (_Gatekeeper,), {"port": port, "one_at_a_time": threading.Lock()})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Gatekeeper(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer's second packet waits 40 ms for the first one's ACK

    def log_message(self, *args):
        pass

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        with self.one_at_a_time:
            status, headers, answer = self._forward(body) if self._matches(body) else _NOT_MATCHED
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in {"content-length", "transfer-encoding", "connection", "server", "date"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815 - http.server's names

    def _forward(self, body):
        skipped = {"host", "connection", "accept-encoding"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
        return _ask(self.port, self.command, self.path, body, headers)

    def _matches(self, body):
        parts = urlsplit(self.path)
        wanted = parse_qs(parts.query).get("ifGenerationMatch")
        return not wanted or self._generation(parts.path, body) == int(wanted[0])

    def _generation(self, path, body):
        """The object's generation; 0 where there is none. An upload names its object in its first part."""
        named = _OBJECT.search(path)
        name = unquote(named[1]) if named else json.loads(b'"' + _NAME.search(body)[1] + b'"')
        bucket = re.search(r"/b/([^/]+)/o", path)[1]
        status, _, answer = _ask(self.port, "GET", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}")
        return int(json.loads(answer)["generation"]) if status == 200 else 0


_NOT_MATCHED = (
    412,
    [("Content-Type", "application/json")],
    b'{"error": {"code": 412, "message": "At least one of the pre-conditions you specified did not hold."}}',
)
