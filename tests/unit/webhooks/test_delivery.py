"""Gathering outcomes into entries and delivering them, over a real database and a real receiver."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from functools import partial

import pytest
from werkzeug import Response

from tests.clock import Clock, Event, elapse
from tests.outcomes import completed
from tests.servers import free_port
from tests.waiting import until
from text2img.databases import Collections, NewPrompt, Run, Selection, open_database
from text2img.errors import ErrorCode
from text2img.prompts import Failed, PromptId, RequestedParameters, request
from text2img.webhooks.client import CallbackClient
from text2img.webhooks.delivery import TimeLimit, collect, collect_orphaned, deliver

WISHES = RequestedParameters(num_inference_steps=1, guidance_scale=1, width=64, height=64)


@pytest.fixture
def database(tmp_path):
    database = open_database(f"sqlite:///{tmp_path}/prompts.db", Collections())
    yield database
    database.close()


@pytest.fixture
def clock(tmp_path):
    """The clock of deliveries, which passes for the database as well."""
    return Clock(partial(elapse, tmp_path / "prompts.db"))


@pytest.fixture
def tell(database, httpserver, clock):
    """Deliver to the scripted receiver; without a URL of another one. Only the clock waits between tries."""

    def deliver_to(url=None, patience=10.0, stop=None, timeout=60.0):
        receiver = CallbackClient(url or httpserver.url_for("/hook"), timeout=timeout)
        deliver(database.outbox, receiver, "w", TimeLimit(patience, stop or Event(clock), clock))

    return deliver_to


def work(database, count, run_id="run-1", first=0):
    """So many prompts come in and are done under that run, every third of them in vain."""
    numbers = range(first, first + count)
    database.runs.enqueue(
        NewPrompt(id=PromptId("int", str(n)), text=f"prompt {n}", requested=RequestedParameters())
        for n in numbers
    )
    prompts = database.queue.claim("w", count, 60, Selection())
    outcomes = [
        Failed(prompt=prompt, code=ErrorCode.SAFETY, message="flagged", attempts=1)
        if int(prompt.id.text) % 3 == 2
        else completed(request(prompt, [WISHES]))
        for prompt in prompts
    ]
    assert len(database.queue.record(outcomes, run_id, notify=True)) == count


def script(httpserver, *statuses):
    for status in statuses:
        httpserver.expect_ordered_request("/hook", method="POST").respond_with_response(
            Response(status=status)
        )


def posts(httpserver):
    return [(sent.headers["webhook-id"], json.loads(sent.get_data())) for sent, _ in httpserver.log]


def ids(body):
    return {entry["prompt_id"] for entry in body["results"] + body["errors"]}


def run(run_id, status="completed"):
    return Run(id=run_id, started_at=datetime.now(UTC), host="h", status=status)


def test_end_of_a_run_is_one_final_entry(database, httpserver, tell):
    """What a run has done is told by one POST, final, with its counts."""
    work(database, 5)
    script(httpserver, 200)
    assert collect(database.outbox, "run-1", "completed", final=True) == 5
    tell()
    [(_, body)] = posts(httpserver)
    assert body["final"] is True
    assert (body["run_id"], body["status"]) == ("run-1", "completed")
    assert body["counts"] == {"completed": 4, "error": 1}
    assert ids(body) == {"0", "1", "2", "3", "4"}


def test_only_the_last_entry_is_final(database, httpserver, tell):
    """Seven outcomes, three an entry: three POSTs, each outcome once, the last alone final."""
    work(database, 7)
    script(httpserver, 200, 200, 200)
    assert collect(database.outbox, "run-1", "completed", final=True, limit=3) == 7
    tell()
    bodies = [body for _, body in posts(httpserver)]
    assert [body["final"] for body in bodies] == [False, False, True]
    assert [sum(body["counts"].values()) for body in bodies] == [3, 3, 1]
    assert set.union(*map(ids, bodies)) == {str(n) for n in range(7)}


def test_entry_in_the_middle_of_a_run(database, httpserver, tell):
    """Before the end one entry of the given size is made and told as running; the rest is told at the end."""
    work(database, 4)
    script(httpserver, 200, 200)
    assert collect(database.outbox, "run-1", "running", final=False, limit=3) == 3
    tell()
    assert collect(database.outbox, "run-1", "completed", final=True, limit=3) == 1
    tell()
    bodies = [body for _, body in posts(httpserver)]
    assert [(body["status"], body["final"]) for body in bodies] == [("running", False), ("completed", True)]


def test_nothing_done_is_not_told(database, httpserver, tell):
    """A run without outcomes makes no entry and no POST."""
    assert collect(database.outbox, "run-1", "completed", final=True) == 0
    tell()
    assert posts(httpserver) == []


def test_tried_again_with_same_id_and_body(database, httpserver, tell, clock):
    """503, 503, 200: three POSTs with growing waits, one id, one body; then it is told."""
    work(database, 2)
    script(httpserver, 503, 503, 200)
    collect(database.outbox, "run-1", "completed", final=True)
    tell()
    first, second = clock.pauses
    assert 0.75 <= first <= 1
    assert 1.5 <= second <= 2
    assert len(posts(httpserver)) == 3
    assert len({sent.get_data() for sent, _ in httpserver.log}) == 1
    assert len({each for each, _ in posts(httpserver)}) == 1
    tell()
    assert len(posts(httpserver)) == 3


def test_retry_after_is_waited_for(database, httpserver, tell, clock):
    """A receiver that asks for two seconds gets them."""
    work(database, 1)
    answer = Response(status=429, headers={"Retry-After": "2"})
    httpserver.expect_ordered_request("/hook").respond_with_response(answer)
    script(httpserver, 200)
    collect(database.outbox, "run-1", "completed", final=True)
    tell()
    assert clock.pauses == [2]
    assert len(posts(httpserver)) == 2


def test_retry_after_beyond_the_patience_is_left_and_kept(database, httpserver, tell, clock):
    """Asked to come back in an hour, we end at once, and the next delivery does not come early."""
    work(database, 1)
    answer = Response(status=503, headers={"Retry-After": "3600"})
    httpserver.expect_request("/hook").respond_with_response(answer)
    collect(database.outbox, "run-1", "completed", final=True)
    tell(patience=5)
    tell(patience=5)
    assert (clock.pauses, len(posts(httpserver))) == ([], 1)
    clock.advance(3600)
    tell(patience=5)
    assert len(posts(httpserver)) == 2


def test_dead_receiver_costs_the_patience_at_most(database, httpserver, tell, clock):
    """Nobody listens: delivery ends in time, and the next run tells at once under the same id."""
    work(database, 2)
    collect(database.outbox, "run-1", "completed", final=True)
    tell(f"http://127.0.0.1:{free_port()}/hook", patience=30)
    assert 15 < sum(clock.pauses) <= 30
    script(httpserver, 200)
    tell(patience=0)
    assert ids(posts(httpserver)[0][1]) == {"0", "1"}


def test_hanging_receiver_costs_patience_and_one_try(database, httpserver, tell, clock):
    """A receiver that does not answer is given up after the patience and the try that was under way."""
    work(database, 1)
    retry_after, free = [], threading.Event()

    def hang(sent):
        retry_after.append(sent.headers["webhook-id"])
        free.wait()
        return Response()

    httpserver.expect_request("/hook").respond_with_handler(hang)
    collect(database.outbox, "run-1", "completed", final=True)
    try:
        tell(patience=0, timeout=0.2)  # it is over while the receiver still thinks
        until(lambda: retry_after)
        assert (len(retry_after), clock.pauses) == (1, [])
    finally:
        free.set()


@pytest.mark.parametrize("status", [410, 400, 301])
def test_refusal_closes_the_entry(database, httpserver, tell, status):
    """What a receiver refuses is not sent again, and the entries behind it still are."""
    work(database, 2)
    collect(database.outbox, "run-1", "completed", final=True, limit=1)
    script(httpserver, status, 200)
    tell()
    tell()
    assert len(posts(httpserver)) == 2


def test_stop_ends_a_wait_at_once(database, httpserver, tell):
    """Set the event, and a delivery that waits for its next try ends; the entry is due at once again."""
    work(database, 1)
    collect(database.outbox, "run-1", "completed", final=True)
    script(httpserver, 503, 200)
    stop = Event(clock := Clock(lambda _: stop.set()))  # asked to stop while it waits
    tell(patience=float("inf"), stop=stop)
    assert (len(clock.pauses), len(posts(httpserver))) == (1, 1)
    tell()
    assert len(posts(httpserver)) == 2


def test_two_deliveries_at_once_send_each_entry_once(database, httpserver):
    """Entries are claimed: two workers share the work and repeat nothing."""
    work(database, 20)
    collect(database.outbox, "run-1", "completed", final=True, limit=1)
    httpserver.expect_request("/hook").respond_with_data("")
    receiver, limit = (
        CallbackClient(httpserver.url_for("/hook"), timeout=60),
        TimeLimit(600, threading.Event()),
    )
    threads = [
        threading.Thread(target=deliver, args=(database.outbox, receiver, f"w{n}", limit)) for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(posts(httpserver)) == len({each for each, _ in posts(httpserver)}) == 20


def test_dead_run_is_told_of_by_the_next(database, httpserver, tell):
    """Outcomes of a run whose lease is over are told as interrupted, those of a live run are left alone."""
    database.runs.save_run(run("dead", "running"), lease_seconds=0)
    database.runs.save_run(run("alive", "running"), lease_seconds=60)
    work(database, 2, "dead")
    work(database, 3, "alive", first=10)
    script(httpserver, 200)
    assert collect_orphaned(database.outbox) == 2
    tell()
    [(_, body)] = posts(httpserver)
    assert (body["run_id"], body["status"], body["final"]) == ("dead", "interrupted", True)


def test_crash_between_marking_and_keeping_loses_nothing(database, httpserver, tell):
    """What was marked for an entry that was never kept is gathered again once its run is dead."""
    database.runs.save_run(run("dead", "running"), lease_seconds=0)
    work(database, 3, "dead")
    database.outbox.collect("dead", "msg_never_kept", 1000)
    script(httpserver, 200)
    assert collect_orphaned(database.outbox) == 3
    tell()
    assert ids(posts(httpserver)[0][1]) == {"0", "1", "2"}
