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
from text2img.databases import Collections, NewPrompt, Notice
from text2img.prompts import PromptId, Wishes
from text2img.webhooks.delivery import _own
from text2img.webhooks.payloads import compose

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
        self.untold, self.in_notices = set(), []
        self.owed, self.seen = {}, []  # ids by notice, what tellers have read of it (and may come late with)
        self.notices, self.bodies, self.tries, self.sendings = {}, {}, {}, []
        self.own = {}  # webhooks' notices, as they were kept first
        self.numbers = itertools.count()

    @initialize()
    def begin_in_the_middle(self):
        """The interesting steps come late: two outcomes, one of them in a notice, are where it starts."""
        self.one_more_is_done(completed, BACKENDS[0])
        self.one_more_is_done(failed)
        self.gather(1)

    def teardown(self):
        self.database.close()

    @precondition(lambda self: len(self.untold) < 3)
    @rule(become=st.sampled_from([completed, failed]), url=st.sampled_from([None, *BACKENDS]))
    def one_more_is_done(self, become, url=None):
        name = PromptId("int", str(next(self.numbers)))
        wishes = Wishes(seed=1)
        self.database.enqueue([NewPrompt(id=name, text="a boat", wishes=wishes, webhook_url=url)])
        (prompt,) = self.database.claim("w", 1, MINUTE, ALL)
        assert self.database.record([become(prompt)], RUN, tell=True)
        self.untold.add(name.text)
        if url:
            (new,) = [each for each in self.database.owed(9) if each.outcome.id == name]
            self.owed[new.notice_id] = name.text

    @precondition(lambda self: self.owed)
    @rule(limit=st.integers(1, 2))
    def look_what_is_owed(self, limit):
        """Nothing is marked by it: another may see, and settle, the same."""
        owed = self.database.owed(limit)
        assert len(owed) == min(limit, len(self.owed))
        assert {each.notice_id for each in owed} <= self.owed.keys()
        self.seen.append(owed)

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), dies=st.booleans())
    def settle_what_was_owed(self, data, dies):
        """Old sightings are used as readily as new ones; who dies in between has kept the notices alone."""
        owed = data.draw(st.sampled_from(self.seen))
        notices = [_own(each) for each in owed]
        self.database.settle_owed([] if dies else owed, notices)
        for notice in notices:
            if notice.id not in self.notices:
                self.notices[notice.id], self.tries[notice.id] = "due", 0
                self.own[notice.id] = notice
            if not dies:
                self.owed.pop(notice.id, None)

    def _gather(self, limit):
        name = f"msg_{next(self.numbers)}"
        told, more = self.database.gather(RUN, name, limit)
        assert {each.id.text for each in told} <= self.untold
        assert (len(told), more) == (min(limit, len(self.untold)), len(self.untold) > limit)
        return name, told

    @precondition(lambda self: self.untold)
    @rule(limit=st.integers(1, 2))
    def gather(self, limit):
        name, told = self._gather(limit)
        self.bodies[name] = compose(RUN, "interrupted", told, final=False)
        for _ in range(2):
            self.database.save_notice(Notice(id=name, run_id=RUN, body=self.bodies[name]))
        self.notices[name], self.tries[name] = "due", 0
        self.in_notices += [each.id.text for each in told]
        self.untold -= set(self.in_notices)

    @precondition(lambda self: self.untold)
    @rule(limit=st.integers(1, 2))
    def die_while_gathering(self, limit):
        """What was marked for a notice that is never kept is found by whoever asks for what the dead left."""
        self._gather(limit)
        assert self.database.untold_runs() == [RUN]

    @rule()
    def ask_what_the_dead_left(self):
        assert self.database.untold_runs() == ([RUN] if self.untold else [])

    @precondition(lambda self: self.notices)
    @rule(worker=TELLERS, lease=st.sampled_from([0.0, MINUTE]), but=st.sets(st.sampled_from(BACKENDS)))
    def begin_to_send_a_webhook(self, worker, lease, but):
        """A backend that is left alone is told nothing, the others are."""
        due = {
            name for name, own in self.own.items() if own.origin not in but and self.notices[name] == "due"
        }
        notice = self.database.claim_notice(worker, lease, webhooks=True, but=but)
        assert (notice is None) == (not due)
        if notice is None:
            return
        assert notice.id in due
        self.tries[notice.id] += 1
        assert notice == replace(self.own[notice.id], tries=self.tries[notice.id])
        self.notices[notice.id] = "sending" if lease else "due"
        self.sendings.append(notice)

    @precondition(lambda self: self.notices)
    @rule(worker=TELLERS, lease=st.sampled_from([0.0, MINUTE]))
    def begin_to_send(self, worker, lease):
        """With a lease over nothing the teller dies of it, and the notice is anybody's."""
        due = {name for name, state in self.notices.items() if state == "due" and name not in self.own}
        notice = self.database.claim_notice(worker, lease)
        assert (notice is None) == (not due)
        if notice is None:
            return
        assert notice.id in due
        assert notice.body == self.bodies[notice.id]
        self.tries[notice.id] += 1
        assert notice.tries == self.tries[notice.id]
        self.notices[notice.id] = "sending" if lease else "due"
        self.sendings.append(notice)

    @precondition(lambda self: self.sendings)
    @rule(data=st.data(), told=st.booleans())
    def close(self, data, told):
        """The first answer closes it for good."""
        notice = data.draw(st.sampled_from(self.sendings))
        self.database.close_notice(notice, told=told, detail="said")
        if self.notices[notice.id] in OPEN:
            self.notices[notice.id] = "told" if told else "refused"

    @precondition(lambda self: self.sendings)
    @rule(data=st.data(), wait=st.sampled_from([0.0, MINUTE]))
    def put_off(self, data, wait):
        """Of the tries at a notice only the latest has a say in when the next is."""
        notice = data.draw(st.sampled_from(self.sendings))
        self.database.postpone_notice(notice, wait, "later")
        if self.notices[notice.id] in OPEN and notice.tries == self.tries[notice.id]:
            self.notices[notice.id] = "put off" if wait else "due"

    @invariant()
    def every_notice_is_due_until_it_is_told_or_refused(self):
        for webhooks in (False, True):
            states = [state for name, state in self.notices.items() if (name in self.own) == webhooks]
            still = sum(state in OPEN for state in states)
            assert self.database.notices(webhooks=webhooks) == (still, states.count("refused"))

    @invariant()
    def each_outcome_waits_or_is_in_one_notice(self):
        counts = self.database.counts(ALL)
        assert (counts.untold, counts.owed) == (len(self.untold), len(self.owed))
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
