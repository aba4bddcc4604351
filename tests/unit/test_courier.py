"""What is owed to prompts' own webhooks is told: soon, once, and by the next run where it could not be."""

from __future__ import annotations

import json
import threading
import time

import pytest
from werkzeug import Response

from tests.outcomes import completed
from tests.servers import free_port
from text2img.callbacks.courier import Courier
from text2img.callbacks.credentials import Credentials
from text2img.callbacks.telling import gather_owed
from text2img.callbacks.webhooks import Webhooks
from text2img.databases import Collections, NewPrompt, Selection, open_database
from text2img.errors import ErrorCode
from text2img.prompts import Failed, PromptId, Wishes, request
from text2img.prompts.webhooks import WebhookHosts

DEFAULTS = Wishes(num_inference_steps=20, guidance_scale=7.5, width=512, height=512)
PLACE = "/api/webhooks/inference"
HOSTS = WebhookHosts.parse("127.0.0.1, localhost")


@pytest.fixture
def database(tmp_path):
    database = open_database(f"sqlite:///{tmp_path}/p.db", Collections())
    yield database
    database.close()


@pytest.fixture
def courier(database):
    """Makes couriers, and ends their threads."""
    made = []

    def make(hosts=HOSTS, timeout=2.0):
        made.append(Courier(database, Webhooks(hosts, Credentials(), timeout), f"w{len(made)}"))
        return made[-1]

    yield make
    for each in made:
        each.close(5)


def work(database, base, *names, code=None, attempts=1):
    """Prompts with that webhook are done, or have failed; what the worker would announce."""
    database.enqueue(
        NewPrompt(id=PromptId("str", name), text="a cat", wishes=Wishes(seed=7), webhook_url=base)
        for name in names
    )
    outcomes = [
        Failed(prompt=prompt, code=code, sentence="it broke", attempts=attempts)
        if code
        else completed(request(prompt, [DEFAULTS]))
        for prompt in database.claim("w", len(names), 60, Selection())
    ]
    assert len(database.record(outcomes, "run-1", tell=False)) == len(names)


def heard(httpserver):
    """(path's last word, id, body) of each request, in order."""
    return [
        (sent.path.rsplit("/", 1)[1], sent.headers["webhook-id"], json.loads(sent.get_data()))
        for sent, _ in httpserver.log
    ]


def until(condition, seconds=15.0):
    """Wait for what other threads bring about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


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
    assert database.notices(webhooks=True) == (0, 0)


def test_what_is_recorded_is_told_at_once(database, httpserver, courier):
    """While a run goes on, within a second or so of being recorded, not at its end."""
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    running = courier()
    running.start()
    for name in ("a", "b", "c"):
        work(database, base(httpserver), name)
        started = time.monotonic()
        running.wake()
        until(lambda name=name: any(body["generation_id"] == name for *_, body in heard(httpserver)))
        assert time.monotonic() - started < 5
    running.close(5)
    assert len(heard(httpserver)) == 3


def test_many_that_are_owed_are_each_told_once(database, httpserver, courier):
    """Two couriers at once share a hundred notices and repeat none; the ids are as many."""
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    names = [str(number) for number in range(100)]
    work(database, base(httpserver), *names)
    couriers = [courier(), courier()]
    threads = [threading.Thread(target=each.finish, args=(30, threading.Event())) for each in couriers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = heard(httpserver)
    assert sorted(body["generation_id"] for *_, body in told) == sorted(names)
    assert len({msg for _, msg, _ in told}) == 100


def test_tried_again_with_same_id_and_body(database, httpserver, courier):
    """503 twice, then 200: three POSTs with growing waits, one id and one body."""
    for status in (503, 503, 200):
        httpserver.expect_ordered_request(f"{PLACE}/complete").respond_with_response(Response(status=status))
    work(database, base(httpserver), "a")
    started = time.monotonic()
    courier().finish(20, threading.Event())
    assert 2 < time.monotonic() - started < 12
    assert len(httpserver.log) == 3
    assert len({(sent.headers["webhook-id"], sent.get_data()) for sent, _ in httpserver.log}) == 1
    assert database.notices(webhooks=True) == (0, 0)


@pytest.mark.parametrize("status", [410, 404, 301])
def test_a_refusal_closes_the_notice(database, httpserver, courier, status):
    """It is not sent again, and what comes after it is."""
    httpserver.expect_ordered_request(f"{PLACE}/complete").respond_with_response(Response(status=status))
    httpserver.expect_ordered_request(f"{PLACE}/complete").respond_with_data("")
    work(database, base(httpserver), "a", "b")
    courier().finish(10, threading.Event())
    courier().finish(0, threading.Event())
    assert len(httpserver.log) == 2
    assert database.notices(webhooks=True) == (0, 1)


def test_retry_after_is_obeyed_by_the_next_run_as_well(database, httpserver, courier):
    """Asked to come back in an hour, we end at once, and nobody comes early."""
    answer = Response(status=429, headers={"Retry-After": "3600"})
    httpserver.expect_request(f"{PLACE}/complete").respond_with_response(answer)
    work(database, base(httpserver), "a")
    started = time.monotonic()
    courier().finish(10, threading.Event())
    courier().finish(10, threading.Event())
    assert time.monotonic() - started < 6
    assert len(httpserver.log) == 1
    assert database.notices(webhooks=True) == (1, 0)


def test_a_dead_backend_holds_up_no_other(database, httpserver, courier):
    """With many notices for one that refuses connections, those for another are told at once; the dead one's
    are kept, and the next run tells them under the ids they had.
    """
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    port = free_port()
    work(database, f"http://localhost:{port}", *(f"dead {number}" for number in range(20)))
    work(database, base(httpserver), "a", "b")
    gather_owed(database)
    started = time.monotonic()
    courier().finish(1.5, threading.Event())
    assert time.monotonic() - started < 8
    assert {body["generation_id"] for *_, body in heard(httpserver)} == {"a", "b"}
    assert database.notices(webhooks=True) == (20, 0)


def test_a_hanging_backend_holds_up_no_other_and_ends_in_time(database, httpserver, courier):
    """Beside one that never answers others are told; the end waits for the patience and one try at most."""
    over = threading.Event()
    hanging = httpserver.expect_request(f"/hangs{PLACE}/complete")
    hanging.respond_with_handler(lambda _: over.wait(30) and Response())
    with _second_server() as other:
        other.expect_request(f"{PLACE}/complete").respond_with_data("")
        work(database, f"{base(httpserver)}/hangs", *(f"hangs {number}" for number in range(5)))
        work(database, base(other), *(str(number) for number in range(10)))
        started = time.monotonic()
        courier(timeout=1.5).finish(1, threading.Event())
        assert time.monotonic() - started < 8
        assert len(other.log) == 10
    over.set()
    assert database.notices(webhooks=True) == (5, 0)


def _second_server():
    from pytest_httpserver import HTTPServer

    return HTTPServer("127.0.0.1", 0)


def test_what_a_dead_run_has_recorded_is_told_by_the_next(database, httpserver, courier):
    """Whether it died before the notice was made or after: the id is that of the record."""
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    work(database, base(httpserver), "a")
    ids = {database.owed(1)[0].notice_id}
    gather_owed(database)
    work(database, base(httpserver), "b")
    ids.add(database.owed(1)[0].notice_id)
    courier().finish(10, threading.Event())
    assert {msg for _, msg, _ in heard(httpserver)} == ids


def test_a_run_that_may_not_tell_a_host_leaves_its_notices(database, httpserver, courier):
    """They stay due, and a run that may tells them."""
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    work(database, base(httpserver), "a")
    courier(WebhookHosts.parse("other.example")).finish(1, threading.Event())
    assert (len(httpserver.log), database.notices(webhooks=True)) == (0, (1, 0))
    courier().finish(10, threading.Event())
    assert len(httpserver.log) == 1


def test_stop_ends_it_at_once(database, courier):
    """A signal does not wait for the patience."""
    work(database, f"http://127.0.0.1:{free_port()}", "a")
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    started = time.monotonic()
    courier().finish(60, stop)
    assert time.monotonic() - started < 5


def test_the_end_comes_after_the_progress(database, httpserver, courier):
    """However slow it is to hear of progress, a backend hears of the completion last, and of each milestone
    in order before it; those that it was too slow for are left out.
    """
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    slow = httpserver.expect_request(f"{PLACE}/progress")
    slow.respond_with_handler(lambda _: threading.Event().wait(0.2) or Response())
    work(database, base(httpserver), "a")
    running = courier()
    (prompt,) = _prompts("a", base(httpserver))
    running.progress.batch([prompt])
    running.progress.step(1, 1)
    running.finish(10, threading.Event())
    words = [(word, body.get("progress", {}).get("progress_percent")) for word, _, body in heard(httpserver)]
    assert words[-1] == ("complete", None)
    percents = [percent for _, percent in words[:-1]]
    assert percents == sorted(set(percents))
    assert percents[-1] == 90


class Stumbling:
    """The database, whose first claim of a notice raises what nobody thought of."""

    def __init__(self, database):
        self._database, self.stumbled = database, False

    def __getattr__(self, name):
        return getattr(self._database, name)

    def claim_notice(self, *arguments, **named):
        if not self.stumbled:
            self.stumbled = True
            raise ValueError("a document of somebody else's")
        return self._database.claim_notice(*arguments, **named)


def test_what_nobody_thought_of_does_not_end_the_telling(database, httpserver):
    """A failure of any kind is a line in the log; what is owed is told all the same."""
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    stumbling = Stumbling(database)
    courier = Courier(stumbling, Webhooks(HOSTS, Credentials(), 2.0), "w")
    courier.start()
    work(database, base(httpserver), "a")
    courier.wake()
    until(lambda: httpserver.log)
    courier.close(5)
    assert stumbling.stumbled


def _prompts(name, url):
    from text2img.prompts import Claim, Prompt

    claim = Claim(PromptId("str", name), "w", 1)
    wishes = Wishes(num_inference_steps=1, guidance_scale=1, width=64, height=64)
    return [request(Prompt(claim=claim, text="a cat", webhook_url=url), [wishes])]
