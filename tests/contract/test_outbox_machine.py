"""Tellers in any order of steps, on each database, beside a simple model: who sends, and what is due."""

from __future__ import annotations

import itertools
import json
import uuid
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.contract.database_suite import ALL, MINUTE, MongoBackend, SqliteBackend, failed, opened
from tests.examples import examples
from tests.outcomes import completed
from text2img.databases import Collections, NewPrompt, Notification
from text2img.prompts import PromptId, RequestedParameters
from text2img.webhooks.delivery import _webhook_notification, split
from text2img.webhooks.payloads import callback_payload

RUN = "a run that is dead"
OPEN = {"due", "sending", "put off"}
BACKENDS = ["http://a.example", "http://b.example:81"]
TELLERS = st.sampled_from(["ann", "bob"])


class Machine(RuleBasedStateMachine):
    """Every rule is one step of a teller; old tries are kept, and used as readily as the latest."""

    backend = None

    def __init__(self):
        super().__init__()
        mark = uuid.uuid4().hex[:8]
        names = Collections(
            *(f"{name}_{mark}" for name in ("prompts", "configs", "results", "runs", "notices"))
        )
        self.database = opened(self.backend.url, names)
        self.undelivered, self.in_notices = set(), []
        self.pending_webhooks, self.seen = (
            {},
            [],
        )  # ids by notice, what tellers have read of it (and may come late with)
        self.notifications, self.bodies, self.tries, self.sendings = {}, {}, {}, []
        self.own = {}  # webhooks' notices, as they were kept first
        self.numbers = itertools.count()

    @initialize()
    def begin_in_the_middle(self):
        """The interesting steps come late: two outcomes, one of them in a notice, are where it starts."""
        self.one_more_is_done(completed, BACKENDS[0])
        self.one_more_is_done(failed)
        self.collect(1)

    def teardown(self):
        self.database.close()

    @precondition(lambda self: len(self.undelivered) < 4)
    @rule(become=st.sampled_from([completed, failed]), url=st.sampled_from([None, *BACKENDS]))
    def one_more_is_done(self, become, url=None):
        name = PromptId("int", str(next(self.numbers)))
        requested = RequestedParameters(seed=1)
        self.database.runs.enqueue([NewPrompt(id=name, text="a boat", requested=requested, webhook_url=url)])
        (prompt,) = self.database.queue.claim("w", 1, MINUTE, ALL)
        assert self.database.queue.record([become(prompt)], RUN, notify=True)
        self.undelivered.add(name.text)
        if url:
            (new,) = [each for each in self.database.outbox.pending_webhooks(9) if each.outcome.id == name]
            self.pending_webhooks[new.notification_id] = name.text

    @precondition(lambda self: self.pending_webhooks)
    @rule(limit=st.integers(1, 2))
    def look_what_is_owed(self, limit):
        """Nothing is marked by it: another may see, and settle, the same."""
        pending_webhooks = self.database.outbox.pending_webhooks(limit)
        assert len(pending_webhooks) == min(limit, len(self.pending_webhooks))
        assert {each.notification_id for each in pending_webhooks} <= self.pending_webhooks.keys()
        self.seen.append(pending_webhooks)

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), dies=st.booleans())
    def settle_what_was_owed(self, data, dies):
        """Old sightings are used as readily as new ones; who dies in between has kept the notices alone."""
        pending_webhooks = data.draw(st.sampled_from(self.seen))
        notifications = [_webhook_notification(each) for each in pending_webhooks]
        self.database.outbox.enqueue_webhooks([] if dies else pending_webhooks, notifications)
        for notification in notifications:
            if notification.id not in self.notifications:
                self.notifications[notification.id], self.tries[notification.id] = "due", 0
                self.own[notification.id] = notification
            if not dies:
                self.pending_webhooks.pop(notification.id, None)

    def _gather(self, limit):
        name = f"msg_{next(self.numbers)}"
        told, more = self.database.outbox.collect(RUN, name, limit)
        assert {each.id.text for each in told} <= self.undelivered
        assert (len(told), more) == (min(limit, len(self.undelivered)), len(self.undelivered) > limit)
        return name, told

    @precondition(lambda self: self.undelivered)
    @rule(limit=st.integers(1, 4))
    def collect(self, limit):
        name, told = self._gather(limit)
        self.bodies[name] = callback_payload(RUN, "interrupted", told, final=False)
        for _ in range(2):
            self.database.outbox.save_notification(Notification(id=name, run_id=RUN, body=self.bodies[name]))
        self.notifications[name], self.tries[name] = "due", 0
        self.in_notices += [each.id.text for each in told]
        self.undelivered -= set(self.in_notices)

    @precondition(lambda self: self.undelivered)
    @rule(limit=st.integers(1, 2))
    def die_while_gathering(self, limit):
        """What was marked for a notice that is never kept is found by whoever asks for what the dead left."""
        self._gather(limit)
        assert self.database.outbox.undelivered_runs() == [RUN]

    @rule()
    def ask_what_the_dead_left(self):
        assert self.database.outbox.undelivered_runs() == ([RUN] if self.undelivered else [])

    @precondition(lambda self: self.notifications)
    @rule(worker=TELLERS, lease=st.sampled_from([0.0, MINUTE]), but=st.sets(st.sampled_from(BACKENDS)))
    def begin_to_send_a_webhook(self, worker, lease, but):
        """A backend that is left alone is told nothing, the others are."""
        due = {
            name
            for name, own in self.own.items()
            if own.origin not in but and self.notifications[name] == "due"
        }
        notification = self.database.outbox.claim_notification(
            worker, lease, webhooks=True, exclude_origins=but
        )
        assert (notification is None) == (not due)
        if notification is None:
            return
        assert notification.id in due
        self.tries[notification.id] += 1
        assert notification == replace(self.own[notification.id], tries=self.tries[notification.id])
        self.notifications[notification.id] = "sending" if lease else "due"
        self.sendings.append(notification)

    @precondition(lambda self: self.notifications)
    @rule(worker=TELLERS, lease=st.sampled_from([0.0, MINUTE]))
    def begin_to_send(self, worker, lease):
        """With a lease over nothing the teller dies of it, and the notice is anybody's."""
        due = {name for name, state in self.notifications.items() if state == "due" and name not in self.own}
        notification = self.database.outbox.claim_notification(worker, lease)
        assert (notification is None) == (not due)
        if notification is None:
            return
        assert notification.id in due
        assert notification.body == self.bodies[notification.id]
        self.tries[notification.id] += 1
        assert notification.tries == self.tries[notification.id]
        self.notifications[notification.id] = "sending" if lease else "due"
        self.sendings.append(notification)

    @precondition(lambda self: self.sendings)
    @rule(data=st.data(), told=st.booleans())
    def close(self, data, told):
        """The first answer closes it for good."""
        notification = data.draw(st.sampled_from(self.sendings))
        self.database.outbox.complete_notification(notification, delivered=told, detail="said")
        if self.notifications[notification.id] in OPEN:
            self.notifications[notification.id] = "told" if told else "refused"

    @precondition(lambda self: self.sendings)
    @rule(data=st.data(), wait=st.sampled_from([0.0, MINUTE]))
    def put_off(self, data, wait):
        """Of the tries at a notice only the latest has a say in when the next is."""
        notification = data.draw(st.sampled_from(self.sendings))
        self.database.outbox.reschedule_notification(notification, wait, "later")
        if self.notifications[notification.id] in OPEN and notification.tries == self.tries[notification.id]:
            self.notifications[notification.id] = "put off" if wait else "due"

    @precondition(lambda self: self.sendings)
    @rule(data=st.data())
    def divide(self, data):
        """A notice that is too large becomes two, once, however often it is asked for."""
        notification = data.draw(st.sampled_from(self.sendings))
        parts = None if notification.id in self.own else split(notification)
        if parts is None:
            return
        self.database.outbox.replace_notification(notification, parts, "too large")
        if self.notifications[notification.id] in OPEN:
            self.notifications[notification.id] = "replaced"
            del self.bodies[notification.id]
            for part in parts:
                assert part.id not in self.notifications
                self.notifications[part.id], self.tries[part.id] = "due", 0
                self.bodies[part.id] = part.body

    @rule()
    def open_again(self):
        refused = [name for name, state in self.notifications.items() if state == "refused"]
        assert self.database.outbox.reopen_notifications() == len(refused)
        self.notifications.update(dict.fromkeys(refused, "due"))

    @invariant()
    def every_notice_is_due_until_it_is_told_or_refused(self):
        for webhooks in (False, True):
            states = [state for name, state in self.notifications.items() if (name in self.own) == webhooks]
            still = sum(state in OPEN for state in states)
            assert self.database.outbox.notifications(webhooks=webhooks) == (still, states.count("refused"))

    @invariant()
    def each_outcome_waits_or_is_in_one_notice(self):
        counts = self.database.runs.counts(ALL)
        assert (counts.undelivered, counts.pending_webhooks) == (
            len(self.undelivered),
            len(self.pending_webhooks),
        )
        assert len(set(self.in_notices)) == len(self.in_notices)
        bodies = [json.loads(body) for body in self.bodies.values()]
        named = [each["prompt_id"] for body in bodies for each in (*body["results"], *body["errors"])]
        assert sorted(named) == sorted(self.in_notices)


def _run(backend, tries):
    run_state_machine_as_test(
        type("BoundMachine", (Machine,), {"backend": backend}),
        settings=settings(
            max_examples=examples(tries), stateful_step_count=25, suppress_health_check=[*HealthCheck]
        ),
    )


@pytest.mark.fuzz
def test_tellers_in_any_order_on_sqlite(tmp_path):
    """Whatever tellers do and wherever they die, each outcome is in one notice, and it is due until told."""
    _run(SqliteBackend(tmp_path), 25)


@pytest.mark.fuzz
def test_tellers_in_any_order_on_mongodb(mongodb_server):
    """The same on MongoDB: each outcome in one notice, each notice due until told or refused."""
    backend = MongoBackend("secantusdb", mongodb_server)
    _run(backend, 5)
    backend.remove()
