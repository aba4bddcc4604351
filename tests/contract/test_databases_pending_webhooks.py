"""Outcomes owed to prompts' own webhooks, on every database: one notice each, whoever makes it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from tests.contract.database_suite import ALL, failed, postponed
from tests.outcomes import completed
from text2img.databases import NewPrompt, Notification
from text2img.databases.documents import WEBHOOK_PENDING
from text2img.prompts import PromptId, RequestedParameters

URL = "http://backend.example"


def _done(stand, *ids, become=completed, url=URL):
    """Prompts with a webhook, done; what is owed for them, by id."""
    stand.put(*({"_id": each, "webhook_url": url} for each in ids))
    stand.record(*(become(prompt) for prompt in stand.claim(limit=len(ids))))
    return {
        pending_webhooks.outcome.id.text: pending_webhooks
        for pending_webhooks in stand.database.outbox.pending_webhooks(10)
    }


def _notice(pending_webhooks, body="{}", origin=URL):
    url = f"{origin}/api/webhooks/inference/complete"
    return Notification(
        id=pending_webhooks.notification_id, run_id=pending_webhooks.run_id, body=body, url=url, origin=origin
    )


def test_final_outcomes_are_owed(stand):
    """A completed prompt with what was used, a failed one with its reason; a postponed one not."""
    stand.put(*({"_id": n, "seed": 7, "webhook_url": URL} for n in (1, 2, 3)), {"_id": 4})
    one, two, three, four = stand.claim()
    stand.record(completed(one), failed(two), postponed(three, 60), completed(four))
    first, second = sorted(
        stand.database.outbox.pending_webhooks(10),
        key=lambda pending_webhooks: pending_webhooks.outcome.id.text,
    )
    assert (first.run_id, first.webhook_url, first.outcome.image_url) == ("run-1", URL, "gs://b/1.png")
    assert (first.outcome.seed, first.outcome.steps, first.outcome.guidance_scale) == (7, 20, 7.5)
    assert (second.outcome.code, second.outcome.message) == ("safety", "$it was flagged")
    assert second.outcome.attempts == 1
    assert stand.database.runs.counts(ALL).pending_webhooks == 2
    assert stand.database.runs.counts(ALL).undelivered == 0


def test_nothing_is_owed_where_the_worker_refused_the_address(stand):
    """An outcome whose prompt has no webhook any more is owed to nobody, whatever its document says."""
    stand.put({"_id": 1, "webhook_url": "http://evil.example"})
    stand.record(failed(replace(stand.claim_one(), webhook_url=None)))
    assert stand.database.outbox.pending_webhooks(10) == []
    assert stand.get(1)["webhook_url"] == "http://evil.example"


def test_the_id_is_the_same_however_often_it_is_asked_for(stand):
    """Every worker that looks sees the same ids, one for each outcome; recording again makes no new one."""
    stand.put({"_id": 1, "webhook_url": URL}, {"_id": 2, "webhook_url": URL})
    outcomes = [completed(prompt) for prompt in stand.claim()]
    stand.record(*outcomes)
    before = stand.database.outbox.pending_webhooks(10)
    stand.record(*outcomes)
    assert stand.database.outbox.pending_webhooks(10) == before
    assert len({pending_webhooks.notification_id for pending_webhooks in before}) == 2
    assert len(stand.database.outbox.pending_webhooks(1)) == 1


def test_two_that_settle_the_same_keep_one_notice(stand):
    """The first body stays; after that nothing is owed, and no trace of it is in the prompt."""
    pending_webhooks = _done(stand, 1)["1"]
    stand.database.outbox.enqueue_webhooks([pending_webhooks], [_notice(pending_webhooks)])
    stand.database.outbox.enqueue_webhooks(
        [pending_webhooks], [_notice(pending_webhooks, body='{"late": 1}')]
    )
    assert stand.database.outbox.pending_webhooks(10) == []
    assert stand.database.runs.counts(ALL).pending_webhooks == 0
    assert stand.database.outbox.claim_notification("w", 60, webhooks=True).body == "{}"
    assert stand.database.outbox.claim_notification("w", 60, webhooks=True) is None
    assert WEBHOOK_PENDING not in stand.get(1)


def test_a_crash_before_the_mark_is_gone_makes_no_second_notice(stand):
    """As after a crash in between: the notice is kept, the mark still there; settled again, it is one."""
    pending_webhooks = _done(stand, 1)["1"]
    stand.database.outbox.enqueue_webhooks([], [_notice(pending_webhooks)])
    assert stand.database.outbox.pending_webhooks(10) == [pending_webhooks]
    stand.database.outbox.enqueue_webhooks([pending_webhooks], [_notice(pending_webhooks)])
    assert (
        stand.database.outbox.pending_webhooks(10),
        stand.database.outbox.notifications(webhooks=True),
    ) == ([], (1, 0))


def test_what_cannot_be_told_is_owed_no_more(stand):
    """Settled without a notice, as where the address has been taken away: it is gone."""
    pending_webhooks = _done(stand, 1)["1"]
    stand.database.outbox.enqueue_webhooks([pending_webhooks], [])
    assert stand.database.outbox.pending_webhooks(10) == []


def test_notices_of_both_kinds_are_apart(stand):
    """Who tells the callback's receiver never claims a webhook's notice, and the other way round."""
    pending_webhooks = _done(stand, 1)["1"]
    stand.database.outbox.enqueue_webhooks([pending_webhooks], [_notice(pending_webhooks)])
    stand.database.outbox.save_notification(Notification(id="n1", run_id="run-1", body="{}"))
    own = stand.database.outbox.claim_notification("w", 60, webhooks=True)
    assert own == replace(_notice(pending_webhooks), tries=1)
    assert stand.database.outbox.claim_notification("w", 60).url is None
    assert stand.database.outbox.claim_notification("w", 60) is None
    stand.database.outbox.complete_notification(own, delivered=False, detail="410")
    assert stand.database.outbox.notifications(webhooks=True) == (0, 1)
    assert stand.database.outbox.notifications() == (1, 0)


def test_backends_in_trouble_are_passed_over(stand):
    """Of the notices that are due, the oldest to a backend that is not named in ``but``."""
    pending_webhooks = _done(stand, 1, 2)
    origins = {"1": "http://a.example", "2": "http://b.example:81"}
    for name, origin in origins.items():
        stand.database.outbox.enqueue_webhooks(
            [pending_webhooks[name]], [_notice(pending_webhooks[name], origin=origin)]
        )
    claim = lambda *but: stand.database.outbox.claim_notification("w", 0, webhooks=True, exclude_origins=but)  # noqa: E731
    assert claim().origin == claim("http://b.example:81").origin == "http://a.example"
    assert claim("http://a.example").origin == "http://b.example:81"
    assert claim(*origins.values()) is None


def test_retry_forgets_what_is_owed(stand):
    """A prompt that is tried again owes nothing of its last failure, and the next outcome has another id."""
    first = _done(stand, 1, become=failed)["1"]
    assert stand.database.runs.retry(None, ALL) == 1
    assert stand.database.outbox.pending_webhooks(10) == []
    stand.record(completed(stand.claim_one()))
    (second,) = stand.database.outbox.pending_webhooks(10)
    assert second.notification_id != first.notification_id


def test_a_mark_that_is_none_of_ours_stays(stand):
    """A number where the id belongs is somebody else's: it is neither told nor taken away."""
    stand.put({"_id": 1, "status": "completed", WEBHOOK_PENDING: 5})
    assert stand.database.outbox.pending_webhooks(10) == []
    assert stand.get(1)[WEBHOOK_PENDING] == 5


def test_a_webhook_goes_in_with_its_prompt(stand):
    """What enqueue adds is what a claim gives."""
    stand.database.runs.enqueue(
        [NewPrompt(id=PromptId("str", "a"), text="a cat", requested=RequestedParameters(), webhook_url=URL)]
    )
    assert stand.claim_one().webhook_url == URL


@pytest.mark.parametrize(
    "query",
    ["webhook_untold IS NOT NULL", "webhook_untold IS NOT NULL AND typeof(webhook_untold) = 'text' LIMIT 5"],
)
def test_what_is_owed_is_found_by_its_index(sqlite_stand, query):
    """Looking for it costs nothing where nothing is owed, however many prompts there are."""
    with closing(sqlite3.connect(sqlite_stand.backend.file)) as connection:
        plan = connection.execute(f"EXPLAIN QUERY PLAN SELECT * FROM datasets WHERE {query}").fetchall()  # noqa: S608
    assert "USING INDEX datasets_owed" in str(plan)
