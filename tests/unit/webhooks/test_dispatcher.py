"""Both kinds of notification are delivered by one dispatcher: soon, once, and by the next run if need be."""

from __future__ import annotations

import threading

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Response

from tests.clock import Clock
from tests.servers import free_port
from tests.unit.webhooks.stand import CallbackStand, WebhookStand
from tests.waiting import until


@pytest.fixture(params=[CallbackStand, WebhookStand], ids=["callback", "webhook"])
def stand(request, tmp_path, httpserver):
    stand = request.param(tmp_path, httpserver)
    yield stand
    stand.close()


def test_a_retry_has_the_same_id_and_body(stand):
    """503 twice, then 200: three POSTs with growing waits, one id and one body; then it is closed."""
    stand.respond(503, 503, 200)
    stand.work("a")
    stand.finish(20)
    assert 2.25 <= sum(stand.clock.pauses) <= 3.75  # two waits that double, and the queries after them
    assert len({(sent.headers["webhook-id"], sent.get_data()) for sent in stand.requests}) == 1
    stand.finish(20)
    assert len(stand.requests) == 3
    assert stand.left() == (0, 0)


def test_a_wait_that_the_receiver_asks_for_is_kept(stand):
    """A receiver that asks for two seconds gets them."""
    stand.respond(Response(status=429, headers={"Retry-After": "2"}), 200)
    stand.work("a")
    stand.finish(20)
    assert 2 <= sum(stand.clock.pauses) <= 2.25
    assert len(stand.requests) == 2


def test_retry_after_is_honoured_by_the_next_run_as_well(stand):
    """Asked to come back in an hour, a run ends at once, and the next one does not come early."""
    stand.respond(Response(status=503, headers={"Retry-After": "3600"}), 200)
    stand.work("a")
    stand.finish(10)
    stand.finish(10)
    assert (stand.clock.pauses, len(stand.requests)) == ([], 1)
    assert stand.left() == (1, 0)
    stand.clock.advance(3600)
    stand.finish(0)
    assert len(stand.requests) == 2


@pytest.mark.parametrize("status", [410, 404, 301])
def test_a_rejected_notification_is_closed(stand, status):
    """It is not sent again, and what comes after it is."""
    stand.respond(status, 200)
    stand.work("a", "b")
    stand.finish(10)
    stand.finish(0)
    assert len(stand.requests) == 2
    assert stand.left() == (0, 1)


def test_a_single_outcome_that_is_too_large_is_closed(stand):
    """413 for a notification that cannot be divided is a rejection; the next one is sent."""
    stand.respond(413, 200)
    stand.work("a", "b")
    stand.finish(10)
    assert len(stand.requests) == 2
    assert stand.left() == (0, 1)


def test_a_rejected_notification_can_be_opened_again(stand):
    """Once the receiver is mended it gets the same id and body, from the next run."""
    stand.respond(410, 200)
    stand.work("a")
    stand.finish(10)
    assert stand.database.outbox.reopen_notifications() == 1
    stand.finish(10)
    first, second = ((sent.headers["webhook-id"], sent.get_data()) for sent in stand.requests)
    assert first == second
    assert stand.left() == (0, 0)


CHANGES = {
    "an id of two lines": "_id = 'a' || char(10) || 'b'",
    "an id of bytes": "_id = x'61'",
    "an id that is no Unicode": "_id = CAST(x'fc' AS TEXT)",
    "an id of 1,000 characters": "_id = hex(zeroblob(500))",
    "no body": "body = NULL",
    "a number as body": "body = 7",
    "a body that is no Unicode": "body = CAST(x'fc' AS TEXT)",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_notification_that_cannot_be_sent_is_closed(stand, change, caplog):
    """Another program has changed its id or body: no receiver is blamed, and the next one is sent at once."""
    stand.respond(200)
    stand.work("a", "b")
    stand.change(f"UPDATE callbacks SET {CHANGES[change]} WHERE rowid = 1")  # noqa: S608 - ours
    stand.finish(10)
    assert len(stand.requests) == 1
    assert stand.left() == (0, 1)
    assert stand.clock.pauses == []
    assert "it cannot be sent" in caplog.text


def test_a_dead_receiver_costs_the_patience_at_most(stand):
    """Nothing listens: the end comes in time, and the next run delivers under the same ids at once."""
    stand.url = f"http://127.0.0.1:{(port := free_port())}"
    stand.work("a", "b")
    ids = stand.ids()
    stand.finish(30)
    assert 15 < sum(stand.clock.pauses) <= 30.25
    assert stand.left() == (2, 0)
    with HTTPServer("127.0.0.1", port) as back:
        back.expect_request(stand.path).respond_with_data("")
        stand.finish(1)
        assert {sent.headers["webhook-id"] for sent, _ in back.log} == ids


def test_a_hanging_receiver_costs_the_patience_and_one_attempt(stand, httpserver):
    """A receiver that does not answer is given up; its notifications are kept."""
    begun, over = [], threading.Event()

    def hang(sent):
        begun.append(sent.headers["webhook-id"])
        over.wait()
        return Response()

    httpserver.expect_request(stand.path).respond_with_handler(hang)
    stand.work("a", "b", "c")
    try:
        stand.finish(0.5, timeout=0.2)  # it is over while the receiver still has not answered
        until(lambda: begun)
        assert (len(begun), stand.clock.pauses) == (1, [])
    finally:
        over.set()
    assert stand.left() == (3, 0)


def test_two_workers_deliver_each_notification_once(stand, httpserver):
    """Notifications are claimed: two dispatchers at once share fifty and repeat none."""
    httpserver.expect_request(stand.path).respond_with_data("")
    stand.work(*(str(number) for number in range(50)))
    ids = stand.ids()
    both = [stand.dispatcher(wait_for=threading.Condition.wait_for) for _ in range(2)]
    threads = [threading.Thread(target=each.finish, args=(600, threading.Event())) for each in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sent.headers["webhook-id"] for sent in stand.requests) == sorted(ids)


def test_a_stop_ends_the_delivery_at_once(stand):
    """A signal does not wait for the patience: a quarter of a second later it is over, and all is due."""
    stand.url = f"http://127.0.0.1:{free_port()}"
    stand.work("a")
    stop = threading.Event()
    clock = Clock(lambda _: stop.set())  # asked to stop during the first pause
    stand.dispatcher(clock=clock).finish(60, stop)
    assert clock.pauses == [0.25]
    assert stand.claim().tries == 2


class Stumbling:
    """An outbox whose first claim of a notification raises an unexpected error."""

    def __init__(self, outbox):
        self._outbox, self.stumbled = outbox, False

    def __getattr__(self, name):
        return getattr(self._outbox, name)

    def claim_notification(self, *arguments, **named):
        if not self.stumbled:
            self.stumbled = True
            raise ValueError("a document of another program")
        return self._outbox.claim_notification(*arguments, **named)


def test_an_unexpected_error_does_not_end_the_delivery(stand, httpserver, caplog):
    """A failure of any kind is a line in the log; after a pause the dispatcher goes on."""
    httpserver.expect_request(stand.path).respond_with_data("")
    pauses = []

    def wait_for(condition, predicate, seconds):
        pauses.append(seconds)
        return condition.wait_for(predicate) if len(pauses) > 1 else predicate()

    stand.work("a")
    stumbling = Stumbling(stand.database.outbox)
    dispatcher = stand.dispatcher(outbox=stumbling, wait_for=wait_for)
    dispatcher.start()
    dispatcher.wake()
    until(lambda: stand.requests)
    dispatcher.close(60)
    assert (stumbling.stumbled, pauses[0]) == (True, 5)
    assert f"{stand.name} delivery failed" in caplog.text


def test_what_is_left_is_delivered_in_the_background(stand, httpserver):
    """A dispatcher that has been started sends what an earlier run left, without being woken."""
    httpserver.expect_request(stand.path).respond_with_data("")
    stand.work("a")
    dispatcher = stand.dispatcher(wait_for=lambda condition, predicate, _: condition.wait_for(predicate))
    dispatcher.start()
    until(lambda: stand.left() == (0, 0))
    dispatcher.close(60)
    assert len(stand.requests) == 1
