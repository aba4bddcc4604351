"""Workers in any order of steps, on each database, beside a model that is simple enough to believe."""

from __future__ import annotations

import itertools
import json
import uuid

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.contract.database_suite import ALL, MINUTE, MongoBackend, SqliteBackend, failed, opened, postponed
from tests.examples import examples
from tests.outcomes import completed, iterated
from text2img.databases import Collections, NewPrompt, Notification
from text2img.prompts import Completed, Failed, PromptId, RequestedParameters, RetryLater
from text2img.webhooks.payloads import callback_payload

WORKERS = st.sampled_from(["ann", "bob", "cy"])
RUN = "run-1"
IDS = range(5)
IMAGES = (1, 2, 3, 1, 2)
"""Pictures of each prompt."""
LORA = [{"path": "ink.safetensors", "weight": 0.5}]


class Believed:
    """What the model knows of one prompt."""

    def __init__(self):
        self.status, self.number, self.deaths, self.attempts = "pending", 0, 0, 0
        self.holder, self.expired, self.started = None, False, False
        self.undelivered, self.noticed, self.tries = False, 0, 0


class Machine(RuleBasedStateMachine):
    """Every rule is one call of the contract; stale claims are kept, and used as readily as live ones."""

    backend = None

    def __init__(self):
        super().__init__()
        # Tables of its own for every example: a fresh database would take longer than the example.
        mark = uuid.uuid4().hex[:8]
        self.names = Collections(
            *(f"{name}_{mark}" for name in ("prompts", "configs", "results", "runs", "notices"))
        )
        self.database = opened(self.backend.url, self.names)
        self.known, self.claims, self.gathered, self.outcomes = {}, [], {}, []
        self.numbers = itertools.count()

    def teardown(self):
        self.database.close()

    @rule(id_=st.sampled_from(IDS))
    def enqueue(self, id_):
        new = NewPrompt(
            id=PromptId("int", str(id_)),
            text=f"boat {id_}",
            requested=RequestedParameters(seed=id_, num_images=IMAGES[id_], lora=LORA),
            priority=id_ % 2,
        )
        assert self.database.runs.enqueue([new]) == (id_ not in self.known)
        self.known.setdefault(id_, Believed())

    @rule(worker=WORKERS, limit=st.integers(1, 3), lease=st.sampled_from([0.0, MINUTE, MINUTE]))
    def claim(self, worker, limit, lease):
        free = {id_ for id_, one in self.known.items() if one.status == "pending" or one.expired}
        prompts = self.database.queue.claim(worker, limit, lease, ALL)
        got = [int(prompt.id.text) for prompt in prompts]
        assert len(set(got)) == len(got) == min(limit, len(free))
        assert set(got) <= free
        for prompt, one in zip(prompts, map(self.known.get, got), strict=True):
            one.deaths += one.expired and one.started
            assert (prompt.claim.number, prompt.deaths) == (one.number + 1, one.deaths)
            assert (prompt.attempts, len(prompt.tries)) == (one.attempts, one.tries)
            one.status, one.number, one.holder = "processing", prompt.claim.number, prompt.claim
            one.expired, one.started = lease == 0, False
            self.claims.append(prompt)

    def _live(self, prompt):
        one = self.known[int(prompt.id.text)]
        return one if one.status == "processing" and one.holder == prompt.claim else None

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), lease=st.sampled_from([0.0, MINUTE]))
    def extend(self, data, lease):
        prompt = data.draw(st.sampled_from(self.claims))
        one = self._live(prompt)
        assert self.database.queue.extend([prompt.claim], lease) == ([] if one else [prompt.claim])
        if one:
            one.expired = lease == 0

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def start(self, data):
        prompt = data.draw(st.sampled_from(self.claims))
        others = [other for other in self.claims if other.claim.id != prompt.claim.id]
        left = data.draw(st.lists(st.sampled_from(others), max_size=2)) if others else []
        self.database.queue.start([prompt.claim], left=[other.claim for other in left])
        for other in left:
            if one := self._live(other):
                one.started = False
        if one := self._live(prompt):
            one.started = True

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def release(self, data):
        prompt = data.draw(st.sampled_from(self.claims))
        self.database.queue.release([prompt.claim])
        if one := self._live(prompt):
            one.status, one.holder, one.expired, one.started = "pending", None, False, False

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), become=st.sampled_from([completed, iterated, failed, postponed]))
    def record(self, data, become):
        prompt = data.draw(st.sampled_from(self.claims))
        urls = tuple(f"u{n}" for n in range(IMAGES[int(prompt.id.text)]))
        several = become is completed and len(urls) > 1
        outcome = become(prompt, image_urls=urls) if several else become(prompt)
        one = self._live(prompt)
        written = self.database.queue.record([outcome], RUN, notify=True)
        if one is None:
            # Repeating what was written may say so, and changes nothing: the invariants look.
            assert written in ([], [outcome])
            return
        assert written == [outcome]
        one.holder, one.expired, one.started = None, False, False
        one.attempts = outcome.attempts if isinstance(outcome, Failed | RetryLater) else 0
        one.tries = 0 if isinstance(outcome, Completed | Failed) else one.tries + (become is iterated)
        one.deaths = 0 if isinstance(outcome, Completed) else one.deaths
        one.status = (
            "completed"
            if isinstance(outcome, Completed)
            else "error"
            if isinstance(outcome, Failed)
            else "pending"
        )
        one.undelivered = one.status != "pending"

    @rule()
    def retry(self):
        wrong = [one for one in self.known.values() if one.status == "error"]
        assert self.database.runs.retry(None, ALL) == len(wrong)
        for one in wrong:
            one.status, one.deaths, one.attempts, one.undelivered = "pending", 0, 0, False

    @rule(limit=st.integers(1, 3))
    def collect(self, limit):
        name = f"msg_{next(self.numbers)}"
        before = sum(one.undelivered for one in self.known.values())
        told, more = self.database.outbox.collect(RUN, name, limit)
        assert len(told) == min(limit, before)
        assert more == (before > limit)
        if told:
            notification = Notification(
                id=name, run_id=RUN, body=callback_payload(RUN, "running", told, final=False)
            )
            self.database.outbox.save_notification(notification)
            self.database.outbox.save_notification(notification)
            self.gathered[name] = notification.body
        for one in (self.known[int(each.id.text)] for each in told):
            assert one.undelivered
            one.undelivered, one.noticed = False, one.noticed + 1

    @rule(worker=WORKERS, told=st.booleans())
    def send(self, worker, told):
        due, refused = self.database.outbox.notifications()
        notification = self.database.outbox.claim_notification(worker, MINUTE)
        assert (notification is None) == (due == 0)
        if notification:
            assert notification.body == self.gathered[notification.id]
            self.database.outbox.complete_notification(notification, delivered=told, detail="said")
            assert self.database.outbox.notifications() == (due - 1, refused + (not told))

    @invariant()
    def nothing_is_lost_and_nobody_shares(self):
        counts = self.database.runs.counts(ALL)
        believed = [one.status for one in self.known.values()]
        seen = {status: getattr(counts, status) for status in ("pending", "processing", "completed", "error")}
        assert seen == {status: believed.count(status) for status in seen}
        for prompt in self.claims:
            assert self.database.queue.holds(prompt.claim) == (self._live(prompt) is not None)

    @invariant()
    def what_is_told_is_told_once(self):
        bodies = [json.loads(body) for body in self.gathered.values()]
        named = [each["prompt_id"] for body in bodies for each in (*body["results"], *body["errors"])]
        assert self.database.runs.counts(ALL).undelivered == sum(
            one.undelivered for one in self.known.values()
        )
        for id_, one in self.known.items():
            assert named.count(str(id_)) == one.noticed

    @invariant()
    def results_and_owners_fields(self):
        for id_, one in self.known.items():
            found = self.backend.get(id_, self.names.datasets)
            assert (found["text"], found["seed"], found["priority"]) == (f"boat {id_}", id_, id_ % 2)
            assert found["lora"] == LORA
            assert (found.get("claim_number") or 0) == one.number
            result = self.backend.get(id_, self.names.dataset_records, "dataset_id")
            assert (result is not None) == (one.status == "completed")
            urls = [f"u{n}" for n in range(IMAGES[id_])] if IMAGES[id_] > 1 else []
            assert found.get("image_urls", []) == (urls if result else [])
            assert (result or {}).get("image_urls", []) == (urls if result else [])
        done = sum(one.status == "completed" for one in self.known.values())
        assert done == self.backend.count(self.names.dataset_records)


def _run(backend, tries, steps):
    machine = type("BoundMachine", (Machine,), {"backend": backend})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples(tries), stateful_step_count=steps, suppress_health_check=[*HealthCheck]
        ),
    )


@pytest.mark.fuzz
def test_any_order_of_steps_on_sqlite(tmp_path):
    """Whatever workers do in whatever order, no prompt is lost, shared, done twice or told twice (SQLite)."""
    _run(SqliteBackend(tmp_path), 20, 25)


@pytest.mark.fuzz
def test_any_order_of_steps_on_mongodb(mongodb_server):
    """Whatever workers do in whatever order, no prompt is lost, shared, made twice or told twice (Mongo)."""
    backend = MongoBackend("secantusdb", mongodb_server)
    _run(backend, 5, 20)
    backend.remove()
