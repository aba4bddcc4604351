"""Telling of results: a dead receiver costs nothing, and the next run tells what could not be told."""

from __future__ import annotations

import threading

import pytest
from werkzeug import Response

from tests.acceptance import product
from tests.acceptance.product import SCENE, sleeping
from tests.servers import free_port

JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.mark.smoke
def test_what_a_run_could_not_tell_the_next_one_tells(tmp_path, httpserver):
    """With its receiver down a run ends well; the next, with nothing else to do, tells it, signed."""
    from standardwebhooks import Webhook

    product.add(tmp_path, SCENE)
    told = ("--callback-patience", "0", "--callback-url", f"http://127.0.0.1:{free_port()}/")
    down = sleeping.run(*JOB, "--run-id", "first", *told, folder=tmp_path)
    assert (down.returncode, down.stdout.startswith("completed 1")) == (0, True), down.stderr
    status = product.run("status", *JOB[:2], folder=tmp_path).stdout
    assert "1 to be sent" in status
    httpserver.expect_oneshot_request("/told", method="POST").respond_with_data("", status=503)
    httpserver.expect_request("/told", method="POST").respond_with_data("")
    told = ("--callback-patience", "60", "--callback-url", httpserver.url_for("/told"))
    up = product.run(*JOB, *told, folder=tmp_path, CALLBACK_SECRET=SECRET)
    assert up.returncode == 0, up.stderr
    first, second = (request for request, _ in httpserver.log)
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.data == second.data
    Webhook(SECRET).verify(second.data, dict(second.headers))
    assert second.get_json()["run_id"] == "first"
    assert [result["prompt_id"] for result in second.get_json()["results"]]
    status = product.run("status", *JOB[:2], folder=tmp_path).stdout
    assert "0 to be sent, 0 rejected" in status


@pytest.fixture
def over():
    """Set when a test is over, so that no receiver's thread outlives it."""
    event = threading.Event()
    yield event
    event.set()


def _answers(status, headers=None, after=0):
    """A receiver that answers so, after so many seconds; None: not at all."""

    def install(httpserver, over):
        def handle(request):
            over.wait(after)
            return Response(status=status, headers=headers)

        httpserver.expect_request("/told", method="POST").respond_with_handler(handle)
        return httpserver.url_for("/told")

    return install


def _is_down(httpserver, over):
    return f"http://127.0.0.1:{free_port()}/told"


RECEIVERS = {
    "down": (_is_down, "1 to be sent, 0 rejected"),
    "slow": (_answers(200, after=2), "0 to be sent, 0 rejected"),
    "500": (_answers(500), "1 to be sent, 0 rejected"),
    "301": (_answers(301, {"Location": "/elsewhere"}), "0 to be sent, 1 rejected"),
    "410": (_answers(410), "0 to be sent, 1 rejected"),
    "429": (_answers(429, {"Retry-After": "3600"}), "1 to be sent, 0 rejected"),
    "hangs": (_answers(200, after=None), "1 to be sent, 0 rejected"),
}


@pytest.mark.parametrize("kind", RECEIVERS)
def test_no_receiver_changes_the_exit_status(tmp_path, httpserver, over, kind):
    """Down, slow, 500, 301, 410, 429 with Retry-After, hanging: the run completes with status 0 and ends, and
    ``status`` shows what is untold or refused. A redirect is not followed, and 429 is obeyed.
    """
    install, shown = RECEIVERS[kind]
    product.add(tmp_path, SCENE)
    job = (*JOB, "--callback-patience", "1")
    finished = sleeping.run(*job, "--callback-url", install(httpserver, over), folder=tmp_path)
    over.set()
    assert (finished.returncode, finished.stdout.split(";")[0]) == (
        0, "completed 1, failed 0, remaining 0",
    ), finished.stderr  # fmt: skip
    assert shown in product.run("status", *JOB[:2], folder=tmp_path).stdout
    posts = [request.path for request, _ in httpserver.log]
    assert set(posts) <= {"/told"}
    assert kind not in {"slow", "301", "410", "429"} or len(posts) == 1


def test_a_silent_receiver_does_not_block_generation(tmp_path, httpserver, over):
    """While a receiver has been sent an earlier run's notice and is silent, pictures are made."""
    pictures = tmp_path / "pictures"
    grew = []

    def count():
        return len(list(pictures.glob("*.png")))

    def handle(request):
        before, rounds = count(), 90
        (tmp_path / "release").touch()
        # clock: silent for 9 s, a second less than a try is given
        while count() == before < 7 and rounds and not over.wait(0.1):
            rounds -= 1
        grew.append(count() > before)
        return Response()

    product.add(tmp_path, SCENE)
    down = f"http://127.0.0.1:{free_port()}/"
    first = sleeping.run(*JOB, "--callback-patience", "0", "--callback-url", down, folder=tmp_path)
    assert first.returncode == 0
    product.add(tmp_path, *(f"hold {n}" for n in range(6)))
    httpserver.expect_request("/told", method="POST").respond_with_handler(handle)
    told = ("--callback-url", httpserver.url_for("/told"), "--callback-patience", "1")
    finished = sleeping.run(*JOB, "--batch-size", "1", *told, folder=tmp_path)
    assert (finished.returncode, count()) == (0, 7), finished.stderr
    assert grew[0]
