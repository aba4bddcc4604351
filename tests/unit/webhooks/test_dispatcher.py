"""What is owed to prompts' own webhooks is told: soon, once, and by the next run where it could not be."""

from __future__ import annotations

import json
import threading
from functools import partial

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Response

from tests.clock import Clock, elapse
from tests.outcomes import completed
from tests.servers import free_port
from tests.waiting import until
from text2img.databases import Collections, NewPrompt, Selection, open_database
from text2img.errors import ErrorCode
from text2img.prompts import Failed, PromptId, RequestedParameters, request
from text2img.prompts.webhook_urls import HostAllowlist
from text2img.webhooks.client import Webhooks
from text2img.webhooks.delivery import collect_webhooks
from text2img.webhooks.dispatcher import WebhookDispatcher
from text2img.webhooks.payloads import Credentials

DEFAULTS = RequestedParameters(num_inference_steps=20, guidance_scale=7.5, width=512, height=512)
PLACE = "/api/webhooks/inference"
HOSTS = HostAllowlist.parse("127.0.0.1, localhost")


@pytest.fixture
def database(tmp_path):
    database = open_database(f"sqlite:///{tmp_path}/p.db", Collections())
    yield database
    database.close()


@pytest.fixture
def clock(tmp_path):
    """The couriers' clock, which passes for the database as well."""
    return Clock(partial(elapse, tmp_path / "p.db"))


@pytest.fixture
def courier(database, clock):
    """Makes couriers, and ends their threads. Without a wait of their own they wait ``by`` the clock."""
    made = []

    def make(hosts=HOSTS, timeout=60.0, wait_for=None, by=clock):
        sender, wait_for = Webhooks(hosts, Credentials(), timeout), wait_for or quickly(by)
        made.append(WebhookDispatcher(database.outbox, sender, f"w{len(made)}", clock=by, wait_for=wait_for))
        return made[-1]

    yield make
    for each in made:
        each.close(60)


def quickly(clock):
    """A wait for requests that are under way, and else by the clock alone."""

    def wait_for(condition, predicate, seconds):
        if threading.current_thread() is not threading.main_thread():
            return patiently(condition, predicate, seconds)
        condition.release()
        for thread in threading.enumerate():
            if thread.name == "webhook":
                thread.join()
        condition.acquire()
        if not predicate():
            clock.advance(seconds)
        return predicate()

    return wait_for


def patiently(condition, predicate, seconds):
    """Wait for what other threads bring about, however long that takes."""
    return condition.wait_for(predicate)


def work(database, base, *names, code=None, attempts=1):
    """Prompts with that webhook are done, or have failed; what the worker would announce."""
    database.runs.enqueue(
        NewPrompt(
            id=PromptId("str", name), text="a cat", requested=RequestedParameters(seed=7), webhook_url=base
        )
        for name in names
    )
    outcomes = [
        Failed(prompt=prompt, code=code, message="it broke", attempts=attempts)
        if code
        else completed(request(prompt, [DEFAULTS]))
        for prompt in database.queue.claim("w", len(names), 60, Selection())
    ]
    assert len(database.queue.record(outcomes, "run-1", notify=False)) == len(names)


def heard(httpserver):
    """(path's last word, id, body) of each request, in order."""
    return [
        (sent.path.rsplit("/", 1)[1], sent.headers["webhook-id"], json.loads(sent.get_data()))
        for sent, _ in httpserver.log
    ]


def base(httpserver, host="127.0.0.1"):
    return f"http://{host}:{httpserver.port}"


def test_complete_and_failed_say_what_the_contract_says(database, httpserver, courier):
    """Exactly these fields: the picture with what it was made by; the error, its code in capitals, the tries
    before it.
    """
    httpserver.expect_request(f"{PLACE}/complete", method="POST").respond_with_data("")
    httpserver.expect_request(f"{PLACE}/failed", method="POST").respond_with_data("")
    work(database, base(httpserver), "a")
    work(database, base(httpserver), "b", code=ErrorCode.GENERATION_FAILED, attempts=3)
    work(database, base(httpserver), "c", code=ErrorCode.LORA_FAILED)
    work(database, base(httpserver), "d", code=ErrorCode.ABANDONED, attempts=2)
    courier().finish(10, threading.Event())
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
    assert database.outbox.notifications(webhooks=True) == (0, 0)


def test_what_is_recorded_is_told_at_once(database, httpserver, courier):
    """While a run goes on, as soon as it is recorded: neither at its end nor at the next regular look."""
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    running = courier(wait_for=patiently)  # no look is due by time alone
    running.start()
    for name in ("a", "b", "c"):
        work(database, base(httpserver), name)
        running.wake()
        until(lambda name=name: any(body["generation_id"] == name for *_, body in heard(httpserver)))
    running.close(60)
    assert len(heard(httpserver)) == 3


def test_many_that_are_owed_are_each_told_once(database, httpserver, courier):
    """Two couriers at once share a hundred notices and repeat none; the ids are as many."""
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    names = [str(number) for number in range(100)]
    work(database, base(httpserver), *names)
    couriers = [courier(wait_for=threading.Condition.wait_for) for _ in range(2)]
    threads = [threading.Thread(target=each.finish, args=(600, threading.Event())) for each in couriers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = heard(httpserver)
    assert sorted(body["generation_id"] for *_, body in told) == sorted(names)
    assert len({msg for _, msg, _ in told}) == 100


def test_tried_again_with_same_id_and_body(database, httpserver, courier, clock):
    """503 twice, then 200: three POSTs with growing waits, one id and one body."""
    for status in (503, 503, 200):
        httpserver.expect_ordered_request(f"{PLACE}/complete").respond_with_response(Response(status=status))
    work(database, base(httpserver), "a")
    courier().finish(20, threading.Event())
    assert 2.25 <= sum(clock.pauses) <= 3.75  # two waits that double, and the looks after them
    assert len(httpserver.log) == 3
    assert len({(sent.headers["webhook-id"], sent.get_data()) for sent, _ in httpserver.log}) == 1
    assert database.outbox.notifications(webhooks=True) == (0, 0)


@pytest.mark.parametrize("status", [410, 404, 301])
def test_a_refusal_closes_the_notice(database, httpserver, courier, status):
    """It is not sent again, and what comes after it is."""
    httpserver.expect_ordered_request(f"{PLACE}/complete").respond_with_response(Response(status=status))
    httpserver.expect_ordered_request(f"{PLACE}/complete").respond_with_data("")
    work(database, base(httpserver), "a", "b")
    courier().finish(10, threading.Event())
    courier().finish(0, threading.Event())
    assert len(httpserver.log) == 2
    assert database.outbox.notifications(webhooks=True) == (0, 1)


def test_retry_after_is_obeyed_by_the_next_run_as_well(database, httpserver, courier, clock):
    """Asked to come back in an hour, we end at once, and nobody comes early."""
    answer = Response(status=429, headers={"Retry-After": "3600"})
    httpserver.expect_request(f"{PLACE}/complete").respond_with_response(answer)
    work(database, base(httpserver), "a")
    courier().finish(10, threading.Event())
    courier().finish(10, threading.Event())
    assert (clock.pauses, len(httpserver.log)) == ([], 1)
    assert database.outbox.notifications(webhooks=True) == (1, 0)
    clock.advance(3600)
    courier().finish(0, threading.Event())
    assert len(httpserver.log) == 2


def test_a_dead_backend_holds_up_no_other(database, httpserver, courier, clock):
    """With many notices for one that refuses connections, those for another are told before any wait; the
    dead one's are kept when the patience is over, and the next run tells them under the ids they had.
    """
    told = []
    httpserver.expect_request(f"{PLACE}/complete").respond_with_handler(
        lambda _: told.append(clock.now) or Response()
    )
    port = free_port()
    work(database, f"http://localhost:{port}", *(f"dead {number}" for number in range(20)))
    ids = {each.notification_id for each in database.outbox.pending_webhooks(100)}
    work(database, base(httpserver), "a", "b")
    collect_webhooks(database.outbox)
    courier().finish(1.5, threading.Event())
    assert {body["generation_id"] for *_, body in heard(httpserver)} == {"a", "b"}
    assert told == [1000.0] * 2
    assert 0.75 <= sum(clock.pauses) <= 1.75
    assert database.outbox.notifications(webhooks=True) == (20, 0)
    with HTTPServer("127.0.0.1", port) as other:
        other.expect_request(f"{PLACE}/complete").respond_with_data("")
        courier().finish(60, threading.Event())
        assert {msg for _, msg, _ in heard(other)} == ids


def test_a_hanging_backend_holds_up_no_other(database, httpserver, courier):
    """While one does not answer, all that is owed to another is told."""
    retry_after, over = threading.Event(), threading.Event()

    def hang(_):
        retry_after.set()
        over.wait()
        return Response()

    httpserver.expect_request(f"{PLACE}/complete").respond_with_handler(hang)
    with HTTPServer("127.0.0.1", 0) as other:
        other.expect_request(f"{PLACE}/complete").respond_with_data("")
        work(database, base(httpserver), *(f"hangs {number}" for number in range(5)))
        running = courier(timeout=600, wait_for=patiently)
        running.start()
        retry_after.wait()
        work(database, base(other), *(str(number) for number in range(10)))
        running.wake()
        try:
            until(lambda: len(other.log) == 10)
            assert httpserver.log == []
        finally:
            over.set()
    until(lambda: database.outbox.notifications(webhooks=True) == (0, 0))


def test_the_end_does_not_wait_for_a_hanging_backend(database, httpserver, courier, clock):
    """It takes the patience and one try at most; the notices are kept."""
    retry_after, over = [], threading.Event()

    def hang(sent):
        retry_after.append(sent.headers["webhook-id"])
        over.wait()
        return Response()

    httpserver.expect_request(f"{PLACE}/complete").respond_with_handler(hang)
    work(database, base(httpserver), *(f"hangs {number}" for number in range(5)))
    try:
        courier(timeout=0.2).finish(0.5, threading.Event())  # it is over while the backend still thinks
        until(lambda: retry_after)
        assert (len(retry_after), clock.pauses) == (1, [])
    finally:
        over.set()
    assert database.outbox.notifications(webhooks=True) == (5, 0)


def test_what_a_dead_run_has_recorded_is_told_by_the_next(database, httpserver, courier):
    """Whether it died before the notice was made or after: the id is that of the record."""
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    work(database, base(httpserver), "a")
    ids = {database.outbox.pending_webhooks(1)[0].notification_id}
    collect_webhooks(database.outbox)
    work(database, base(httpserver), "b")
    ids.add(database.outbox.pending_webhooks(1)[0].notification_id)
    courier().finish(10, threading.Event())
    assert {msg for _, msg, _ in heard(httpserver)} == ids


def test_a_run_that_may_not_tell_a_host_leaves_its_notices(database, httpserver, courier):
    """They stay due, and a run that may tells them."""
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    work(database, base(httpserver), "a")
    courier(HostAllowlist.parse("other.example")).finish(1, threading.Event())
    assert (len(httpserver.log), database.outbox.notifications(webhooks=True)) == (0, (1, 0))
    courier().finish(10, threading.Event())
    assert len(httpserver.log) == 1


def test_stop_ends_it_at_once(database, courier):
    """A signal does not wait for the patience: a quarter of a second later it is over, and all is due."""
    work(database, f"http://127.0.0.1:{free_port()}", "a")
    stop = threading.Event()
    clock = Clock(lambda _: stop.set())  # asked to stop during the first pause
    courier(by=clock).finish(60, stop)
    assert clock.pauses == [0.25]
    assert database.outbox.claim_notification("next", 60, webhooks=True).tries == 2


def test_the_end_comes_after_the_progress(database, httpserver, courier):
    """However slow it is to hear of progress, a backend hears of the completion last, and of each milestone
    in order before it; those that it was too slow for are left out.
    """
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    ending, limits = threading.Event(), []

    def slow(_):
        ending.wait(60)  # for the end, which has to wait for this answer
        return Response()

    def wait_for(condition, predicate, seconds):
        if threading.current_thread().name == "webhook":
            limits.append(seconds)
            ending.set()
        return patiently(condition, predicate, seconds)

    httpserver.expect_request(f"{PLACE}/progress").respond_with_handler(slow)
    work(database, base(httpserver), "a")
    running = courier(wait_for=wait_for)
    (prompt,) = _prompts("a", base(httpserver))
    running.progress.batch([prompt])
    running.progress.step(1, 1)
    running.finish(10, threading.Event())
    words = [(word, body.get("progress", {}).get("progress_percent")) for word, _, body in heard(httpserver)]
    assert words[-1] == ("complete", None)
    percents = [percent for _, percent in words[:-1]]
    assert percents == sorted(set(percents))
    assert percents[-1] == 90
    assert limits == [2]  # it would wait no longer


class Stumbling:
    """The database, whose first claim of a notice raises what nobody thought of."""

    def __init__(self, database):
        self._database, self.stumbled = database, False

    def __getattr__(self, name):
        return getattr(self._database, name)

    def claim_notification(self, *arguments, **named):
        if not self.stumbled:
            self.stumbled = True
            raise ValueError("a document of somebody else's")
        return self._database.outbox.claim_notification(*arguments, **named)


def test_what_nobody_thought_of_does_not_end_the_telling(database, httpserver):
    """A failure of any kind is a line in the log; what is owed is told all the same."""
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    stumbling = Stumbling(database)
    pauses = []

    def wait_for(condition, predicate, seconds):
        pauses.append(seconds)
        return patiently(condition, predicate, seconds) if len(pauses) > 1 else predicate()

    courier = WebhookDispatcher(stumbling, Webhooks(HOSTS, Credentials(), 60.0), "w", wait_for=wait_for)
    courier.start()
    work(database, base(httpserver), "a")
    courier.wake()
    until(lambda: httpserver.log)
    courier.close(60)
    assert (stumbling.stumbled, pauses[0]) == (True, 5)


def _prompts(name, url):
    from text2img.prompts import Claim, Prompt

    claim = Claim(PromptId("str", name), "w", 1)
    requested = RequestedParameters(num_inference_steps=1, guidance_scale=1, width=64, height=64)
    return [request(Prompt(claim=claim, text="a cat", webhook_url=url), [requested])]
