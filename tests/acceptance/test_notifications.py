"""News arrives, or is kept: from the outside, whatever receivers refuse and documents hold."""

from __future__ import annotations

import json
import socketserver
import sqlite3
import threading
from contextlib import closing, contextmanager

import pytest
from werkzeug import Response

from tests.acceptance import product
from tests.acceptance.product import SCENE, sleeping

DATABASE = ("--database", "sqlite:///prompts.db")
JOB = (*DATABASE, "--output", "pictures", "--model-id", str(product.MODEL), "--callback-patience", "60")
LIMIT = 6_000


def _limited(httpserver, size=LIMIT):
    """A receiver of bodies of at most that size, and the list of those that it accepts."""
    accepted = []

    def handle(request):
        if len(request.get_data()) > size:
            return Response(status=413)
        accepted.append(request.get_json())
        return Response()

    httpserver.expect_request("/told", method="POST").respond_with_handler(handle)
    return httpserver.url_for("/told"), accepted


def _status(folder):
    return product.run("status", *DATABASE, folder=folder).stdout


def test_a_receiver_of_small_bodies_is_told_in_parts(tmp_path, httpserver):
    """20 kB to tell a receiver that answers 413 above 6 kB: all are told once, and the last part is final."""
    prompts = [
        {"id": f"p{number:02}", "text": f"prompt {number}, " + "a quiet harbour at dawn, " * 16,
         "num_inference_steps": 1, "guidance_scale": 1, "width": 64, "height": 64}
        for number in range(40)
    ]  # fmt: skip
    product.add(tmp_path, *prompts)
    url, accepted = _limited(httpserver)
    finished = sleeping.run(*JOB, "--callback-url", url, folder=tmp_path, SLEEP_PER_IMAGE="0")
    assert finished.returncode == 0, finished.stderr
    told = [result["prompt_id"] for body in accepted for result in body["results"]]
    assert sorted(told) == [prompt["id"] for prompt in prompts]
    assert [body["final"] for body in accepted] == [False] * (len(accepted) - 1) + [True]
    assert sum(body["counts"]["completed"] for body in accepted) == 40
    assert "0 to be sent, 0 rejected" in _status(tmp_path)


BAD = (
    "INSERT INTO datasets (_id, text, status, untold, run_id, image_url, {0}) "
    "VALUES ('bad', 'x', 'completed', 1, 'a-run', 'x', {1})"
)
VALUES = {
    "score": "9e999",
    "used": """'{"seed": 1e999, "guidance_scale": 1' || printf('%.*c', 400, '0') || '}'""",
    "image_urls": "'[\"\\ud800\", 7]'",
    "prompt_tags": "'[' || printf('%.*c', 50000, '[')",
    "iterations": "-1",
}


@pytest.mark.parametrize("column", VALUES)
def test_one_bad_outcome_holds_back_no_other(tmp_path, httpserver, column):
    """Of two dead runs one has an outcome with a value that JSON cannot say: both, and this run, are told."""
    product.add(tmp_path, SCENE)
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        database.execute(BAD.format(column, VALUES[column]))
        database.execute("INSERT INTO datasets (_id, text, status, untold, run_id, image_url) "
                         "VALUES ('left', 'x', 'completed', 1, 'dead-run', 'x')")  # fmt: skip
    httpserver.expect_request("/told", method="POST").respond_with_data("")
    finished = sleeping.run(*JOB, "--callback-url", httpserver.url_for("/told"), folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    bodies = [json.loads(request.get_data(), parse_constant=pytest.fail) for request, _ in httpserver.log]
    told = [result["prompt_id"] for body in bodies for result in body["results"]]
    assert {"bad", "left"} < set(told)
    assert len(told) == 3
    assert "undelivered        0  (callbacks: 0 to be sent, 0 rejected)" in _status(tmp_path)


def test_rejected_notifications_are_sent_again_on_request(tmp_path, httpserver):
    """410 for both kinds: ``status`` shows it, ``retry --callbacks`` opens them, the next run sends them."""
    for path in ("/told", "/api/webhooks/inference/complete"):
        httpserver.expect_oneshot_request(path, method="POST").respond_with_data("", status=410)
        httpserver.expect_request(path, method="POST").respond_with_data("")
    product.add(tmp_path, {"text": SCENE, "webhook_url": f"http://127.0.0.1:{httpserver.port}"})
    job = (*JOB, "--callback-url", httpserver.url_for("/told"), "--webhook-host", "127.0.0.1")
    assert sleeping.run(*job, folder=tmp_path).returncode == 0
    assert _status(tmp_path).count("0 to be sent, 1 rejected") == 2
    narrowed = product.run("retry", "--callbacks", "--error-code", "safety", *DATABASE, folder=tmp_path)
    assert narrowed.returncode == 2
    assert "--callbacks" in narrowed.stderr
    again = product.run("retry", "--callbacks", *DATABASE, folder=tmp_path)
    assert (again.returncode, again.stdout) == (
        0,
        "reopened 2 rejected notifications; the next run sends them\n",
    )
    assert product.counts(tmp_path) == {"completed": 1}
    assert _status(tmp_path).count("1 to be sent, 0 rejected") == 2
    assert sleeping.run(*job, folder=tmp_path).returncode == 0
    assert _status(tmp_path).count("0 to be sent, 0 rejected") == 1
    posts = [(request.headers["webhook-id"], request.get_data()) for request, _ in httpserver.log
             if request.method == "POST"]  # fmt: skip
    assert len(posts) == 4
    assert len(set(posts)) == 2
    assert "reopened 0" in product.run("retry", "--callbacks", *DATABASE, folder=tmp_path).stdout


class _Odd(socketserver.StreamRequestHandler):
    """Answers with a line among its headers that is none."""

    def handle(self):
        self.request.recv(100_000)
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nno header\r\nConnection: close\r\n\r\n")


@contextmanager
def _odd_receiver():
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Odd) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("answers", [True, False])
def test_no_path_of_a_receiver_is_logged(tmp_path, answers):
    """At DEBUG, of a receiver that answers oddly and of one that is down: neither path is in any line."""
    with _odd_receiver() as url:
        base = url if answers else "http://127.0.0.1:9"
        product.add(tmp_path, {"text": SCENE, "webhook_url": f"{base}/wh-s3cret"})
        loudly = ("--log-level", "DEBUG", "--log-file", "run.log", "--callback-patience", "0")
        told = ("--callback-url", f"{base}/cb-s3c", "--webhook-host", "127.0.0.1")
        finished = sleeping.run(*JOB, *loudly, *told, folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    logged = finished.stderr + (tmp_path / "run.log").read_text()
    assert ("answered 200" in logged) == answers
    assert "s3c" not in logged
