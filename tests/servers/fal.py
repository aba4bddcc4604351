"""fal's queue for tests: a server that keeps the documented protocol, and misbehaves where a test plans it.

https://docs.fal.ai/model-endpoints/queue describes the protocol. In tests/unit/engine/test_hosted_protocol.py
fal's own client tries this server.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import uuid
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image

from tests.waiting import until  # noqa: F401 - tests of the whole job take it from here

KEY = "fal-key-id:fal-key-secret"
MODEL = "fal-ai/flux/dev"
APP = "fal-ai/flux"


@dataclass
class Plan:
    """What becomes of one prompt; by itself it is queued, in progress, and then completed.

    ``submit`` and ``result`` hold answers (status, headers, body) that come first, one each time, ``forever``
    keeps the last of them. ``states``: what the status says, the last for ever. ``fields`` of the result are
    replaced; None takes one away. ``picture`` is the file in place of the right one, ``size`` its size.
    ``hangs`` names what is never answered; a ``lost`` request is accepted and then unknown.
    """

    submit: list = field(default_factory=list)
    result: list = field(default_factory=list)
    forever: bool = False
    states: list = field(default_factory=lambda: ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"])
    fields: dict = field(default_factory=dict)
    image: bytes | None = None
    size: tuple | None = None
    hangs: str = ""
    lost: bool = False
    headers: dict = field(default_factory=dict)
    looks: int = 0


class Fal(ThreadingHTTPServer):
    """The service. ``plans`` by prompt; what was asked of it is kept in ``submitted`` and ``cancelled``."""

    daemon_threads = True

    def __init__(self, tls=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tls = tls
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.plans: dict[str, Plan] = {}
        self.submitted: list[dict] = []
        self.cancelled: list[str] = []
        self.requests: dict[str, dict] = {}
        self.asked: Counter = Counter()
        self.keys_at_files: list = []
        self.together: threading.Barrier | None = None
        self.reached, self.end = threading.Event(), threading.Event()
        self.down = False
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.server_port}"

    def plan(self, prompt, **plan):
        self.plans[prompt] = Plan(**plan)
        return self.plans[prompt]

    def texts(self):
        return [arguments["prompt"] for arguments in self.submitted]

    def handle_error(self, request, client_address):
        """Clients that hang up are what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Fal

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        arguments = json.loads(self.rfile.read(int(self.headers["content-length"])))
        plan = self._plan(arguments)
        if self._refused("submit") or self._first(plan, plan.submit, "submit"):
            return
        if self.path != f"/{MODEL}":
            self._json(404, {"detail": f"Application {self.path[1:]} not found"})
            return
        if self.server.together:
            self.server.together.wait()  # nobody gets through before as many are here
        name = str(uuid.uuid4())
        with self.server.lock:
            self.server.submitted.append(arguments)
            self.server.requests[name] = arguments
        place = f"{self.server.url}/{APP}/requests/{name}"
        addresses = {"response_url": place, "status_url": f"{place}/status", "cancel_url": f"{place}/cancel"}
        self._json(200, {"status": "IN_QUEUE", "request_id": name, "queue_position": 0, **addresses})

    def do_GET(self):
        path = urlsplit(self.path).path
        if path.startswith("/files/"):
            self._file(path.removeprefix("/files/"))
        elif path == "/v1/models/pricing":
            self._price()
        elif path.endswith("/status"):
            self._status(path.removesuffix("/status"))
        else:
            self._result(path)

    def do_PUT(self):
        if self._refused("cancel"):
            return
        name = self.path.removesuffix("/cancel").rpartition("/")[2]
        self.server.cancelled.append(self.server.requests[name]["prompt"])
        self._json(202, {"status": "CANCELLATION_REQUESTED"})

    def _status(self, path):
        arguments = self._known(path)
        if self._refused("status") or arguments is None:
            return
        plan = self._plan(arguments)
        if plan.lost:
            self._json(404, {"detail": "Request not found"})
            return
        state = plan.states[min(plan.looks, len(plan.states) - 1)]
        if plan.hangs == state:  # and hangs again when it is asked again
            self.server.reached.set()
            self.server.end.wait()
        plan.looks += 1
        facts = {"queue_position": 0} if state == "IN_QUEUE" else {"logs": None}
        self._json(200 if state == "COMPLETED" else 202, {"status": state, **facts})

    def _result(self, path):
        arguments = self._known(path)
        if self._refused("result") or arguments is None:
            return
        plan = self._plan(arguments)
        if self._first(plan, plan.result, "result"):
            return
        width, height = arguments["image_size"]["width"], arguments["image_size"]["height"]
        url = f"{self.server.url}/files/{path.rpartition('/')[2]}"
        found = {
            "images": [{"url": url, "width": width, "height": height, "content_type": "image/png"}],
            "seed": arguments["seed"],
            "has_nsfw_concepts": [False],
            "prompt": arguments["prompt"],
            **plan.fields,
        }
        found = {name: value for name, value in found.items() if value is not None}
        self._json(200, found, {"x-fal-billable-units": "1.5", **plan.headers})

    def _file(self, name):
        self.server.keys_at_files.append(self.headers["authorization"])
        arguments = self.server.requests[name]
        plan = self._plan(arguments)
        if plan.hangs == "file":
            self.send_response(200)
            self.send_header("content-length", "1000000")
            self.end_headers()
            while not self.server.end.wait(0.05):  # clock: a file that trickles
                self.wfile.write(b"x")
            return
        asked = arguments["image_size"]
        size = plan.size or (asked["width"], asked["height"])
        self._send(200, plan.image or painted(arguments["seed"], size), {"content-type": "image/png"})

    def _price(self):
        if self._refused("price"):
            return
        model = parse_qs(urlsplit(self.path).query)["endpoint_id"][0]
        if model != MODEL:
            self._json(404, {"detail": "no such model"})
            return
        price = {"endpoint_id": model, "unit_price": 0.025, "unit": "megapixels", "currency": "USD"}
        self._json(200, {"prices": [price]})

    def _plan(self, arguments):
        return self.server.plans.setdefault(arguments["prompt"], Plan())

    def _known(self, path):
        arguments = self.server.requests.get(path.rpartition("/")[2])
        if arguments is None or not path.startswith(f"/{APP}/requests/"):
            self._json(404, {"detail": "Request not found"})
            return None
        return arguments

    def _refused(self, what):
        """Whether it is answered already: the service is down, or the key is not the one."""
        self.server.asked[what] += 1
        if self.server.down:
            self._send(503, b"<html>nginx</html>", {})
            return True
        if self.headers["authorization"] != f"Key {KEY}":
            said = f"Cannot access application with {self.headers['authorization']}"
            self._json(401, {"detail": said})
            return True
        return False

    def _first(self, plan, canned, what):
        """Whether it is answered already, by the next of the canned answers."""
        if not canned:
            if plan.hangs == what:
                self.server.reached.set()
                self.server.end.wait()
            return False
        status, headers, body = canned[0] if plan.forever else canned.pop(0)
        self._send(status, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)
        return True

    def _json(self, status, document, headers=None):
        self._send(status, json.dumps(document).encode(), headers or {})

    def _send(self, status, body, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def painted(seed, size):
    """A PNG of one colour, which tells the seed."""
    file = io.BytesIO()
    Image.new("RGB", size, shade(seed)).save(file, "PNG")
    return file.getvalue()


def shade(seed):
    """The colour of the picture with that seed; black without one."""
    if seed is None:
        return (0, 0, 0)
    return (seed % 251, seed // 251 % 251, 200)


def data_url(seed, size):
    """The same picture as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(painted(seed, size)).decode()}"


@contextmanager
def fal_server(tls=None):
    """A service for as long as the block lasts; ``tls``: the context by which it speaks https://."""
    server = Fal(tls)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.end.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def fal():
    """A service of this test's own."""
    with fal_server() as server:
        yield server
