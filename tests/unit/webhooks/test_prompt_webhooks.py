"""Prompts' own webhooks: what they say, in what order, and that no backend holds up another."""

from __future__ import annotations

import json
import threading

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Response

from tests.servers import free_port
from tests.unit.webhooks.stand import WebhookStand, patiently
from tests.waiting import until
from text2img.errors import ErrorCode
from text2img.prompts import Claim, Prompt, PromptId, RequestedParameters, request
from text2img.prompts.ids import HostAllowlist
from text2img.webhooks.delivery import collect_webhooks
from text2img.webhooks.dispatcher import Dispatcher

PLACE = "/api/webhooks/inference"


@pytest.fixture
def stand(tmp_path, httpserver):
    stand = WebhookStand(tmp_path, httpserver)
    yield stand
    stand.close()


def heard(server):
    """(path's last word, id, body) of each request, in order."""
    return [
        (sent.path.rsplit("/", 1)[1], sent.headers["webhook-id"], json.loads(sent.get_data()))
        for sent, _ in server.log
    ]


def test_complete_and_failed_say_what_the_contract_says(stand, httpserver):
    """Exactly these fields: the image with its parameters; the error, its code in capitals, the attempts
    before it.
    """
    httpserver.expect_request(f"{PLACE}/complete", method="POST").respond_with_data("")
    httpserver.expect_request(f"{PLACE}/failed", method="POST").respond_with_data("")
    stand.work("a")
    stand.work("b", code=ErrorCode.GENERATION_FAILED, attempts=3)
    stand.work("c", code=ErrorCode.LORA_FAILED)
    stand.work("d", code=ErrorCode.ABANDONED, attempts=2)
    stand.finish(10)
    bodies = {body["generation_id"]: (word, body) for word, _, body in heard(httpserver)}
    assert bodies["a"] == ("complete", {
        "generation_id": "a", "result_url": "gs://b/a.png",
        "metadata": {"seed": 7, "steps": 20, "guidance_scale": 7.5},
    })  # fmt: skip
    assert bodies["b"] == ("failed", {
        "generation_id": "b", "error_message": "it broke", "error_code": "GENERATION_FAILED",
        "retry_count": 2,
    })  # fmt: skip
    assert (bodies["c"][1]["error_code"], bodies["c"][1]["retry_count"]) == ("LORA_FAILED", 0)
    assert (bodies["d"][1]["error_code"], bodies["d"][1]["retry_count"]) == ("ABANDONED", 2)
    assert stand.left() == (0, 0)


def test_what_is_recorded_is_sent_at_once(stand, httpserver):
    """While a run goes on, as soon as it is recorded: neither at its end nor at the next regular query."""
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    running = stand.dispatcher(wait_for=patiently)  # no query is due by time alone
    running.start()
    for name in ("a", "b", "c"):
        stand.record(name, webhook_url=stand.url)
        running.wake()
        until(lambda name=name: any(body["generation_id"] == name for *_, body in heard(httpserver)))
    running.close(60)
    assert len(heard(httpserver)) == 3


def test_a_dead_backend_holds_up_no_other(stand, httpserver):
    """With many notifications for a backend that refuses connections, those for another are sent before any
    wait; the dead one's are kept, and the next run sends them under the ids they had.
    """
    times = []
    httpserver.expect_request(f"{PLACE}/complete").respond_with_handler(
        lambda _: times.append(stand.clock.now) or Response()
    )
    port = free_port()
    stand.record(*(f"dead {number}" for number in range(20)), webhook_url=f"http://localhost:{port}")
    ids = {each.notification_id for each in stand.database.outbox.pending_webhooks(100)}
    stand.work("a", "b")
    stand.finish(1.5)
    assert {body["generation_id"] for *_, body in heard(httpserver)} == {"a", "b"}
    assert times == [1000.0] * 2
    assert 0.75 <= sum(stand.clock.pauses) <= 1.75
    assert stand.left() == (20, 0)
    with HTTPServer("127.0.0.1", port) as other:
        other.expect_request(f"{PLACE}/complete").respond_with_data("")
        stand.finish(60)
        assert {msg for _, msg, _ in heard(other)} == ids


def test_a_hanging_backend_holds_up_no_other(stand, httpserver):
    """While one does not answer, all that is due to another is sent."""
    begun, over = threading.Event(), threading.Event()

    def hang(_):
        begun.set()
        over.wait()
        return Response()

    httpserver.expect_request(f"{PLACE}/complete").respond_with_handler(hang)
    with HTTPServer("127.0.0.1", 0) as other:
        other.expect_request(f"{PLACE}/complete").respond_with_data("")
        stand.work(*(f"hangs {number}" for number in range(5)))
        running = stand.dispatcher(timeout=600, wait_for=patiently)
        running.start()
        begun.wait()
        stand.record(*(str(number) for number in range(10)), webhook_url=f"http://127.0.0.1:{other.port}")
        running.wake()
        try:
            until(lambda: len(other.log) == 10)
            assert httpserver.log == []
        finally:
            over.set()
        until(lambda: stand.left() == (0, 0))


def test_what_a_dead_run_has_recorded_is_sent_by_the_next(stand, httpserver):
    """The id is that of the record, whether the run died before the notification was made or after."""
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    stand.record("a", webhook_url=stand.url)
    ids = {stand.database.outbox.pending_webhooks(1)[0].notification_id}
    collect_webhooks(stand.database.outbox)
    stand.record("b", webhook_url=stand.url)
    ids.add(stand.database.outbox.pending_webhooks(1)[0].notification_id)
    stand.finish(10)
    assert {msg for _, msg, _ in heard(httpserver)} == ids


def test_a_host_that_a_run_does_not_allow_keeps_its_notifications(stand, httpserver):
    """They stay due, and a run that allows the host sends them."""
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    stand.work("a")
    stand.finish(1, hosts=HostAllowlist.parse("other.example"))
    assert (len(httpserver.log), stand.left()) == (0, (1, 0))
    stand.finish(10)
    assert len(httpserver.log) == 1


def test_the_end_comes_after_the_progress(stand, httpserver):
    """However slowly it answers to progress, a backend gets the completion last, and each milestone in order
    before it; those that it was too slow for are left out.
    """
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    ending, limits = threading.Event(), []

    def slow(_):
        ending.wait(60)  # for the end, which has to wait for this answer
        return Response()

    def wait_for(condition, predicate, seconds):
        if threading.current_thread().name == "delivery":
            limits.append(seconds)
            ending.set()
        return patiently(condition, predicate, seconds)

    httpserver.expect_request(f"{PLACE}/progress").respond_with_handler(slow)
    stand.work("a")
    outbox = stand.database.outbox
    policy = stand.policy(outbox, wait_for=wait_for)
    policy.progress.batch([_request("a", stand.url)])
    policy.progress.step(1, 1)
    Dispatcher(outbox, policy, "w", wait_for=wait_for).finish(10, threading.Event())
    words = [(word, body.get("progress", {}).get("progress_percent")) for word, _, body in heard(httpserver)]
    assert words[-1] == ("complete", None)
    percents = [percent for _, percent in words[:-1]]
    assert percents == sorted(set(percents))
    assert percents[-1] == 90
    assert limits == [2]  # it would wait no longer


def _request(name, url):
    claim = Claim(PromptId("str", name), "w", 1)
    requested = RequestedParameters(num_inference_steps=1, guidance_scale=1, width=64, height=64)
    return request(Prompt(claim=claim, text="a cat", webhook_url=url), [requested])
