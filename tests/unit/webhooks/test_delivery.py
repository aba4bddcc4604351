"""The callback: outcomes are collected in notifications of up to 1,000, and the last one is final."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime

import pytest

from tests.unit.webhooks.stand import CallbackStand
from tests.waiting import until
from text2img.databases import Run
from text2img.errors import ErrorCode
from text2img.webhooks.client import CallbackClient
from text2img.webhooks.delivery import MAX_OUTCOMES, collect, collect_orphaned
from text2img.webhooks.dispatcher import NotifyTargets, RunNotifier


@pytest.fixture
def stand(tmp_path, httpserver):
    stand = CallbackStand(tmp_path, httpserver)
    yield stand
    stand.close()


def bodies(httpserver):
    return [json.loads(sent.get_data()) for sent, _ in httpserver.log]


def ids(body):
    return {entry["prompt_id"] for entry in body["results"] + body["errors"]}


def names(count, first=0):
    return [f"p{number}" for number in range(first, first + count)]


def run(run_id, status="completed"):
    return Run(id=run_id, started_at=datetime.now(UTC), host="h", status=status)


def notifier(stand, interval=None):
    stand.database.runs.save_run(run("run-1", "running"), lease_seconds=600)
    client = CallbackClient(stand.url + stand.path, timeout=60)
    return RunNotifier(stand.database.outbox, NotifyTargets(callback=client, interval=interval), "run-1", "w")


def test_the_end_of_a_run_is_one_final_notification(stand, httpserver):
    """What a run has done is one POST, final, with its counts."""
    stand.record(*names(4))
    stand.record("bad", code=ErrorCode.SAFETY)
    stand.respond(200)
    assert collect(stand.database.outbox, "run-1", "completed", final=True) == 5
    stand.finish(10)
    [body] = bodies(httpserver)
    assert body["final"] is True
    assert (body["run_id"], body["status"]) == ("run-1", "completed")
    assert body["counts"] == {"completed": 4, "error": 1}
    assert ids(body) == {*names(4), "bad"}


def test_only_the_last_notification_is_final(stand, httpserver):
    """Seven outcomes, three in a notification: three POSTs, each outcome once, the last alone is final."""
    stand.record(*names(7))
    stand.respond(200, 200, 200)
    assert collect(stand.database.outbox, "run-1", "completed", final=True, limit=3) == 7
    stand.finish(10)
    assert [body["final"] for body in bodies(httpserver)] == [False, False, True]
    assert [sum(body["counts"].values()) for body in bodies(httpserver)] == [3, 3, 1]
    assert set.union(*map(ids, bodies(httpserver))) == set(names(7))


def test_a_notification_in_the_middle_of_a_run(stand, httpserver):
    """Before the end one notification of the given size is made, as running; the rest follows at the end."""
    stand.database.runs.save_run(run("run-1", "running"), lease_seconds=60)
    stand.record(*names(4))
    stand.respond(200, 200)
    assert collect(stand.database.outbox, "run-1", "running", final=False, limit=3) == 3
    stand.finish(10)
    assert collect(stand.database.outbox, "run-1", "completed", final=True, limit=3) == 1
    stand.finish(10)
    sent = [(body["status"], body["final"]) for body in bodies(httpserver)]
    assert sent == [("running", False), ("completed", True)]


def test_a_run_without_outcomes_sends_nothing(stand, httpserver):
    """There is no notification and no POST."""
    assert collect(stand.database.outbox, "run-1", "completed", final=True) == 0
    stand.finish(10)
    assert httpserver.log == []


def test_more_than_a_thousand_outcomes_are_sent_while_the_run_goes_on(stand, httpserver):
    """The first thousand go out as running; what came after them is the final notification."""
    httpserver.expect_request(stand.path).respond_with_data("")
    notifying = notifier(stand)
    notifying.start()
    for first in (0, 500, 1000):
        prompts = names(500 if first < 1000 else 1, first)
        notifying.recorded(stand.record(*prompts))
    until(lambda: len(httpserver.log) == 1)
    notifying.close("completed", 60)
    notifying.finish(60, threading.Event())
    first, last = bodies(httpserver)
    assert (first["status"], first["final"], len(ids(first))) == ("running", False, MAX_OUTCOMES)
    assert (last["status"], last["final"], len(ids(last))) == ("completed", True, 1)


def test_with_an_interval_outcomes_do_not_wait_for_a_thousand(stand, httpserver):
    """A server's callback is sent every interval, and nothing remains for its end."""
    httpserver.expect_request(stand.path).respond_with_data("")
    notifying = notifier(stand, interval=0.01)
    notifying.start()
    notifying.recorded(stand.record("a"))
    until(lambda: len(httpserver.log) == 1)
    notifying.close("completed", 60)
    notifying.finish(60, threading.Event())
    assert [(body["final"], ids(body)) for body in bodies(httpserver)] == [(False, {"a"})]


def test_a_dead_runs_outcomes_are_sent_by_the_next(stand, httpserver):
    """Outcomes of a run whose lease is over are sent as interrupted, those of a live run are left alone."""
    stand.database.runs.save_run(run("dead", "running"), lease_seconds=0)
    stand.database.runs.save_run(run("alive", "running"), lease_seconds=60)
    stand.record("a", "b", run_id="dead")
    stand.record("c", "d", "e", run_id="alive")
    stand.respond(200)
    assert collect_orphaned(stand.database.outbox) == 2
    stand.finish(10)
    [body] = bodies(httpserver)
    assert (body["run_id"], body["status"], body["final"]) == ("dead", "interrupted", True)


def test_a_crash_between_marking_and_saving_loses_nothing(stand, httpserver):
    """What was assigned to a notification that was never saved is collected again once its run is dead."""
    stand.database.runs.save_run(run("dead", "running"), lease_seconds=0)
    stand.record("a", "b", "c", run_id="dead")
    stand.database.outbox.collect("dead", "msg_never_saved", 1000)
    stand.respond(200)
    assert collect_orphaned(stand.database.outbox) == 3
    stand.finish(10)
    assert ids(bodies(httpserver)[0]) == {"a", "b", "c"}
