"""A real database, a real receiver and dispatchers for each kind of notification."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from functools import partial
from typing import ClassVar

from werkzeug import Response

from tests.clock import Clock, elapse
from tests.outcomes import completed
from text2img.databases import Collections, NewPrompt, Selection, open_database
from text2img.prompts import Failed, PromptId, RequestedParameters, request
from text2img.prompts.ids import HostAllowlist
from text2img.webhooks.client import CallbackClient, Webhooks
from text2img.webhooks.delivery import CallbackPolicy, WebhookPolicy, collect, collect_webhooks
from text2img.webhooks.dispatcher import Dispatcher
from text2img.webhooks.payloads import Credentials

DEFAULTS = RequestedParameters(num_inference_steps=20, guidance_scale=7.5, width=512, height=512)
HOSTS = HostAllowlist.parse("127.0.0.1, localhost")


class Stand:
    """Prompts of one kind of notification, in a SQLite file whose clock is the dispatchers' clock."""

    name: ClassVar[str]
    path: ClassVar[str]

    def __init__(self, folder, httpserver):
        file = folder / "prompts.db"
        self.database = open_database(f"sqlite:///{file}", Collections())
        self.clock = Clock(partial(elapse, file))
        self.server = httpserver
        self.url = f"http://127.0.0.1:{httpserver.port}"
        self._made = []

    def close(self):
        """End the dispatchers' threads and close the database."""
        for dispatcher in self._made:
            dispatcher.close(60)
        self.database.close()

    def respond(self, *responses):
        """Have the receiver answer the requests in this order, each by a status or a response."""
        for response in responses:
            answer = Response(status=response) if isinstance(response, int) else response
            self.server.expect_ordered_request(self.path, method="POST").respond_with_response(answer)

    @property
    def requests(self):
        """The requests that the receiver has got."""
        return [sent for sent, _ in self.server.log]

    def record(self, *names, code=None, attempts=1, run_id="run-1", **fields):
        """Prompts of these names are completed or, with a code, have failed; return their outcomes."""
        self.database.runs.enqueue(
            NewPrompt(id=PromptId("str", name), text="a cat", requested=RequestedParameters(seed=7), **fields)
            for name in names
        )
        outcomes = [
            Failed(prompt=prompt, code=code, message="it broke", attempts=attempts)
            if code
            else completed(request(prompt, [DEFAULTS]))
            for prompt in self.database.queue.claim("w", len(names), 60, Selection())
        ]
        notify = self.name == "callback"
        recorded = self.database.queue.record(outcomes, run_id, notify=notify)
        assert len(recorded) == len(names)
        return recorded

    def dispatcher(self, *, outbox=None, clock=None, wait_for=None, **policy):
        """Make a dispatcher that waits by the clock alone, unless ``wait_for`` is given."""
        outbox, clock = outbox or self.database.outbox, clock or self.clock
        wait_for = wait_for or quickly(clock)
        made = self.policy(outbox, wait_for=wait_for, **policy)
        self._made.append(Dispatcher(outbox, made, f"w{len(self._made)}", clock=clock, wait_for=wait_for))
        return self._made[-1]

    def finish(self, patience, **policy):
        """Deliver what is due as the end of a run does."""
        self.dispatcher(**policy).finish(patience, threading.Event())

    def left(self):
        """Count the notifications that are to be delivered, and those that were rejected."""
        return self.database.outbox.notifications(webhooks=self.name == "webhook")

    def change(self, statement):
        """Change the database as another program would."""
        with closing(sqlite3.connect(self.database.connection.path)) as database, database:
            database.execute(statement)

    def claim(self):
        """Claim the next notification as another worker would."""
        return self.database.outbox.claim_notification("next", 60, webhooks=self.name == "webhook")

    def ids(self):
        """Return the ids of the notifications that are due."""
        claimed = []
        while (notification := self.claim()) is not None:
            claimed.append(notification)
        for notification in claimed:
            self.database.outbox.reschedule_notification(notification, 0, "")
        return {notification.id for notification in claimed}


class CallbackStand(Stand):
    """Outcomes that go to a run's callback, one in each notification."""

    name, path = "callback", "/hook"

    def work(self, *names):
        """Record outcomes and make their notifications."""
        self.record(*names)
        assert collect(self.database.outbox, "run-1", "completed", final=True, limit=1) == len(names)

    def policy(self, outbox, *, timeout=60.0, wait_for=None, interval=None):
        """Return the policy of the run ``run-1``."""
        return CallbackPolicy(
            outbox, CallbackClient(self.url + self.path, timeout=timeout), "run-1", interval
        )


class WebhookStand(Stand):
    """Outcomes of prompts with webhooks of their own."""

    name, path = "webhook", "/api/webhooks/inference/complete"

    def work(self, *names, url=None, **outcome):
        """Record outcomes and make their notifications."""
        self.record(*names, webhook_url=url or self.url, **outcome)
        collect_webhooks(self.database.outbox)

    def policy(self, outbox, *, timeout=60.0, wait_for=None, hosts=HOSTS):
        """Return the policy for these hosts."""
        return WebhookPolicy(outbox, Webhooks(hosts, Credentials(), timeout), wait_for)


def quickly(clock):
    """A wait for requests that are under way, and else by the clock alone."""

    def wait_for(condition, predicate, seconds):
        if threading.current_thread() is not threading.main_thread():
            return patiently(condition, predicate, seconds)
        condition.release()
        for thread in threading.enumerate():
            if thread.name == "delivery":
                thread.join()
        condition.acquire()
        if not predicate():
            clock.advance(seconds)
        return predicate()

    return wait_for


def patiently(condition, predicate, seconds):
    """Wait for what other threads bring about, however long that takes."""
    return condition.wait_for(predicate)
