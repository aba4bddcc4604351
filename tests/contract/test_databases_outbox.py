"""Telling, on every database: outcomes become notices, each of them told at least once, also in crashes."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from tests.contract.database_suite import ALL, failed, postponed
from tests.outcomes import completed
from text2img.databases import Notification, Run, UndeliveredOutcome
from text2img.prompts import PromptId


def _notice(name="n1", run_id="run-1", body='{"counts": {}}'):
    return Notification(id=name, run_id=run_id, body=body)


def _run(name="run-1", status="running"):
    return Run(id=name, started_at=datetime.now(UTC), host="h", status=status)


def _with_outcomes(stand, number, run_id="run-1"):
    stand.put(*({"_id": f"{run_id}-{n}"} for n in range(number)))
    stand.record(*(completed(prompt) for prompt in stand.claim(limit=number)), run_id=run_id, notify=True)


def test_final_outcomes_are_gathered(stand):
    """A completed prompt with its picture and seed, a failed one with its reason; a postponed one not."""
    stand.put({"_id": 1, "seed": 7}, {"_id": 2}, {"_id": 3})
    one, two, three = stand.claim()
    stand.record(completed(one), failed(two), postponed(three, 60), notify=True)
    undelivered, more = stand.database.outbox.collect("run-1", "n1", 10)
    assert undelivered == [
        UndeliveredOutcome(
            id=PromptId("int", "1"),
            text="a boat",
            image_url="gs://b/1.png",
            seed=7,
            steps=20,
            guidance_scale=7.5,
        ),
        UndeliveredOutcome(
            id=PromptId("int", "2"), text="a boat", code="safety", message="$it was flagged", attempts=1
        ),
    ]
    assert more is False


def test_without_tell_nothing_waits(stand):
    """Outcomes of a run without a receiver are never untold."""
    stand.put({"_id": 1})
    stand.record(completed(stand.claim_one()), notify=False)
    assert stand.database.outbox.collect("run-1", "n1", 10) == ([], False)
    assert stand.database.outbox.undelivered_runs() == []
    assert stand.database.runs.counts(ALL).undelivered == 0


def test_gathering_is_bounded_and_disjoint(stand):
    """Each notice gets its own outcomes, and hears whether more are left."""
    _with_outcomes(stand, 5)
    _with_outcomes(stand, 1, run_id="run-2")
    first, more = stand.database.outbox.collect("run-1", "n1", 3)
    second, rest = stand.database.outbox.collect("run-1", "n2", 3)
    assert (len(first), more, len(second), rest) == (3, True, 2, False)
    assert not {each.id for each in first} & {each.id for each in second}


def test_gathering_again_fills_up_to_the_limit(stand):
    """Repeated for the same notice, it gives what the notice has and no more than the limit."""
    _with_outcomes(stand, 5)
    first, _ = stand.database.outbox.collect("run-1", "n1", 2)
    assert stand.database.outbox.collect("run-1", "n1", 2) == (first, True)
    more, left = stand.database.outbox.collect("run-1", "n1", 4)
    assert (len(more), left) == (4, True)


def test_a_kept_notice_counts_its_outcomes_as_told(stand):
    """Once the notice is kept nothing of it is untold; keeping it again changes neither body nor count."""
    _with_outcomes(stand, 2)
    stand.database.outbox.collect("run-1", "n1", 10)
    assert stand.database.runs.counts(ALL).undelivered == 2
    stand.database.outbox.save_notification(_notice())
    stand.database.outbox.save_notification(_notice(body="another"))
    assert stand.database.runs.counts(ALL).undelivered == 0
    assert stand.database.outbox.undelivered_runs() == []
    assert stand.backend.get("n1", "callbacks")["body"] == '{"counts": {}}'
    assert "untold" not in stand.get("run-1-0")


@pytest.mark.parametrize("gathered", [False, True])
def test_a_dead_runs_outcomes_are_untold_again(stand, gathered):
    """What a run that died had marked, or not even marked, is found and can be gathered by the next."""
    stand.database.runs.save_run(_run(), 0)
    _with_outcomes(stand, 3)
    if gathered:
        stand.database.outbox.collect("run-1", "n1", 2)
    assert stand.database.outbox.undelivered_runs() == ["run-1"]
    undelivered, more = stand.database.outbox.collect("run-1", "n2", 10)
    assert (len(undelivered), more) == (3, False)


def test_a_run_that_is_over_is_found(stand):
    """A run that has ended, and one that nobody knows of, count as dead."""
    stand.database.runs.save_run(_run(status="completed"), 60)
    _with_outcomes(stand, 1)
    _with_outcomes(stand, 1, run_id="run-2")
    assert stand.database.outbox.undelivered_runs() == ["run-1", "run-2"]


def test_a_living_runs_outcomes_are_its_own(stand):
    """While the run's lease lasts, nobody takes its outcomes over, marked or not."""
    stand.database.runs.save_run(_run(), 60)
    _with_outcomes(stand, 3)
    stand.database.outbox.collect("run-1", "n1", 2)
    assert stand.database.outbox.undelivered_runs() == []
    undelivered, _ = stand.database.outbox.collect("run-1", "n2", 10)
    assert len(undelivered) == 1


def test_a_crash_after_keeping_the_notice_tells_nothing_twice(stand):
    """Outcomes still marked for a notice that is kept are told by it, not by another."""
    _with_outcomes(stand, 2)
    stand.database.outbox.save_notification(_notice("n1"))
    stand.database.outbox.collect("run-1", "n1", 10)  # as after a crash: marked, and the notice is kept
    stand.database.outbox.save_notification(_notice("n1"))
    assert stand.database.outbox.undelivered_runs() == []


def test_a_notice_is_claimed_by_one(stand):
    """The oldest due notice goes to one sender at a time, each time with one more try."""
    stand.database.outbox.save_notification(_notice("a"))
    stand.database.outbox.save_notification(_notice("b"))
    assert stand.database.outbox.claim_notification("w", 60) == Notification(
        id="a", run_id="run-1", body='{"counts": {}}', tries=1
    )
    assert stand.database.outbox.claim_notification("v", 60).id == "b"
    assert stand.database.outbox.claim_notification("w", 60) is None


def test_a_dead_senders_notice_is_claimed_again(stand):
    """When the sender's lease has run out another may try; the tries go on counting."""
    stand.database.outbox.save_notification(_notice())
    stand.database.outbox.claim_notification("w", 0)
    assert stand.database.outbox.claim_notification("v", 60).tries == 2


@pytest.mark.parametrize(("told", "state"), [(True, "told"), (False, "refused")])
def test_a_closed_notice_is_never_sent_again(stand, told, state):
    """Told, or refused for good: it stays, says so, and is not due any more."""
    stand.database.outbox.save_notification(_notice())
    notification = stand.database.outbox.claim_notification("w", 0)
    assert stand.database.outbox.notifications() == (1, 0)
    stand.database.outbox.complete_notification(notification, delivered=told, detail="HTTP 204")
    assert stand.database.outbox.notifications() == (0, int(not told))
    stand.database.outbox.reschedule_notification(notification, 0, "late")
    stand.database.outbox.save_notification(_notice())
    assert stand.database.outbox.claim_notification("w", 60) is None
    found = stand.backend.get("n1", "callbacks")
    assert (found["state"], found["detail"], found["run_id"]) == (state, "HTTP 204", "run-1")


def test_a_postponed_notice_waits(stand):
    """It is due again after its wait, not before, and says why it could not be told."""
    stand.database.outbox.save_notification(_notice("a"))
    stand.database.outbox.save_notification(_notice("b"))
    first, second = (
        stand.database.outbox.claim_notification("w", 60),
        stand.database.outbox.claim_notification("w", 60),
    )
    stand.database.outbox.reschedule_notification(first, 3600, "HTTP 503")
    stand.database.outbox.reschedule_notification(second, 0, "HTTP 503")
    assert stand.database.outbox.claim_notification("w", 60).id == "b"
    assert stand.database.outbox.claim_notification("w", 60) is None
    assert stand.backend.get("a", "callbacks")["detail"] == "HTTP 503"


def test_a_late_sender_does_not_postpone_anothers_try(stand):
    """Only the latest to have claimed the notice may put it off."""
    stand.database.outbox.save_notification(_notice())
    late = stand.database.outbox.claim_notification("w", 0)
    stand.database.outbox.claim_notification("v", 60)
    stand.database.outbox.reschedule_notification(late, 0, "late")
    assert stand.database.outbox.claim_notification("u", 60) is None


def test_untold_outcomes_are_counted_until_a_notice_keeps_them(stand):
    """Those for the receiver and those for prompts' own webhooks, each by itself; gathered is not told."""
    stand.put({"_id": 1, "webhook_url": "https://h.example/1"}, {"_id": 2}, {"_id": 3})
    database = stand.database
    assert (database.outbox.undelivered(), database.outbox.undelivered(webhooks=True)) == (0, 0)
    one, two, _ = stand.claim()
    stand.record(completed(one), failed(two), notify=True)
    assert (database.outbox.undelivered(), database.outbox.undelivered(webhooks=True)) == (2, 1)
    database.outbox.collect("run-1", "n1", 10)
    assert database.outbox.undelivered() == 2
    database.outbox.save_notification(_notice())
    assert (database.outbox.undelivered(), database.outbox.undelivered(webhooks=True)) == (0, 1)
