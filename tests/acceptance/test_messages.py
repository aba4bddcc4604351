"""Messages and whom they make the job notify: a number stays a number, a sender hears what was wrong, and for
a known id only the stored address is told, its own outcome.
"""

from __future__ import annotations

import json
import signal
from collections import defaultdict

import pytest

from tests.acceptance import product
from tests.acceptance.product import SCENE, sleeping
from tests.waiting import until

PLACE = "/api/webhooks/inference"
JOB = (
    *("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL)),
    *("--poll-seconds", "0.5", "--webhook-host", "127.0.0.1"),
)


class Backends:
    """Several backends on one server, each below a path of its own, and what each of them was told."""

    def __init__(self, server):
        self._server = server
        for name in ("mine", "theirs"):
            for event in ("progress", "complete", "failed"):
                server.expect_request(f"/{name}{PLACE}/{event}").respond_with_data("")

    def url(self, name="mine"):
        return f"http://127.0.0.1:{self._server.port}/{name}"

    def told(self, name="mine"):
        """For each generation, as JSON: (event, webhook-id, body) in order."""
        told = defaultdict(list)
        for request, _ in list(self._server.log):
            if request.path.startswith(f"/{name}/"):
                body = request.get_json()
                event = request.path.rpartition("/")[2]
                told[json.dumps(body["generation_id"])].append(
                    (event, request.headers["webhook-id"], request.get_data())
                )
        return dict(told)

    def ends(self, generation, name="mine"):
        return [each for each in self.told(name).get(generation, []) if each[0] != "progress"]


@pytest.fixture
def backends(httpserver):
    return Backends(httpserver)


def _message(generation, backend, **more):
    return {
        "generation_id": generation,
        "prompt": SCENE,
        "num_inference_steps": 2,
        "webhook_url": backend,
        **more,
    }


def test_whoever_asked_hears_and_no_other(tmp_path, rabbitmq, backends):
    """The number 500 and the text "500" are two generations, told by their own types. A new id with a wrong
    field is told what is wrong and is a dead letter. A message that repeats a finished one is answered under
    the same webhook-id, with the same bytes. One that differs, or is invalid, is a dead letter that reaches
    neither its own address nor the stored one.
    """
    queue = rabbitmq.queue()
    dead = f"{queue}.dead"
    mine, theirs = backends.url(), backends.url("theirs")

    def publish(*messages):
        rabbitmq.publish(queue, *(json.dumps(message).encode() for message in messages))

    publish(
        _message(500, mine),
        _message("500", mine),
        _message(501, mine, width=65),
        _message("f", mine, lora={"path": "/nowhere/a.safetensors"}),
        _message("no-host", "http://other.example", width=65),
        {**_message("silent", mine, width=65), "webhook_url": "nowhere"},
        _message("no-text", mine, prompt=" "),
    )
    server_arguments = ("serve", *JOB, "--rabbitmq-url", rabbitmq.url, "--rabbitmq-queue", queue)
    with sleeping.running(*server_arguments, folder=tmp_path) as server:
        first = ("500", '"500"', "501", '"f"', '"no-text"')
        until(lambda: all(backends.ends(generation) for generation in first), ended=server.poll)
        until(lambda: rabbitmq.ready(dead) == 4)
        once = {generation: backends.ends(generation) for generation in first}
        publish(
            _message(500, mine),
            _message("f", mine, lora={"path": "/nowhere/a.safetensors"}),
            _message(501, mine, width=65),
            _message("500", theirs),  # another address
            _message(500, theirs, width=65),  # invalid
            {**_message(500, theirs), "prompt": "something else"},
        )
        until(lambda: all(len(backends.ends(each)) == 2 for each in ("500", '"f"', "501")), ended=server.poll)
        until(lambda: rabbitmq.ready(dead) == 4 + 4)
        publish(_message("last", mine))
        until(lambda: backends.ends('"last"'), ended=server.poll)
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate()
    assert server.returncode == 143, log
    for generation in ("500", '"f"', "501"):
        assert len(set(backends.ends(generation))) == 1, "the same event, id and bytes"
    assert backends.ends('"500"') == once['"500"']
    assert backends.told("theirs") == {}
    assert [event for event, _, _ in (once["500"] + once['"500"'])] == ["complete"] * 2
    failures = {each: json.loads(once[each][0][2]) for each in ("501", '"no-text"')}
    assert "width" in failures["501"].pop("error_message")
    assert failures["501"] == {"generation_id": 501, "error_code": "INVALID_PARAMETERS", "retry_count": 0}
    assert failures['"no-text"']["error_code"] == "INVALID_PROMPT"
    told = backends.told()
    assert {'"no-host"', '"silent"'}.isdisjoint(told)
    for body in (json.loads(data) for _, _, data in told["500"] if b"progress" in data):
        assert {type(value) for value in body["progress"].values()} == {int}
    reasons = [properties.headers["x-text2img-error"] for properties, _ in rabbitmq.taken(dead)]
    assert sum("differs" in reason for reason in reasons) == 2
    assert product.counts(tmp_path) == {"completed": 3, "error": 1}
