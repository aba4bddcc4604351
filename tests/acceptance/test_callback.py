"""Telling of results: a dead receiver costs nothing, and the next run tells what could not be told."""

from __future__ import annotations

import pytest

from tests.acceptance import product
from tests.servers import free_port

JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.mark.slow
def test_what_a_run_could_not_tell_the_next_one_tells(tmp_path, httpserver):
    """With its receiver down a run ends well; the next, with nothing else to do, tells it, signed."""
    from standardwebhooks import Webhook

    (tmp_path / "prompts.txt").write_text("a large red circle on a blue background\n")
    product.run("enqueue", *JOB[:2], "prompts.txt", folder=tmp_path)
    quick = (*JOB, "--num-inference-steps", "2", "--callback-patience", "1")
    down = product.run(
        *quick, "--run-id", "first", "--callback-url", f"http://127.0.0.1:{free_port()}/", folder=tmp_path
    )
    assert (down.returncode, down.stdout.startswith("completed 1")) == (0, True), down.stderr
    status = product.run("status", *JOB[:2], folder=tmp_path).stdout
    assert "1 still to be told" in status
    httpserver.expect_oneshot_request("/told", method="POST").respond_with_data("", status=503)
    httpserver.expect_request("/told", method="POST").respond_with_data("")
    up = product.run(
        *quick, "--callback-url", httpserver.url_for("/told"), "--callback-patience", "20",
        folder=tmp_path, CALLBACK_SECRET=SECRET,
    )  # fmt: skip
    assert up.returncode == 0, up.stderr
    first, second = (request for request, _ in httpserver.log)
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.data == second.data
    Webhook(SECRET).verify(second.data, dict(second.headers))
    assert second.get_json()["run_id"] == "first"
    assert [result["prompt_id"] for result in second.get_json()["results"]]
    status = product.run("status", *JOB[:2], folder=tmp_path).stdout
    assert "0 still to be told, 0 refused" in status
