"""Repeated messages, on every database: what is stored is compared, and what was told is told again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.contract.database_suite import ALL, failed
from tests.outcomes import completed
from text2img.databases import NewPrompt, Notification
from text2img.databases.documents import WEBHOOK_ID, WEBHOOK_PENDING
from text2img.prompts import PromptId, RequestedParameters

URL = "http://backend.example"
WISHES = RequestedParameters(
    negative_prompt="{}", seed=7, guidance_scale=4, width=64, height=72, lora={"path": "a.safetensors"}
)
NEW = NewPrompt(
    id=PromptId("int", "500"), text="[1]", requested=WISHES, dataset_id=7, priority=1.5, webhook_url=URL
)


def _told(stand):
    """The notifications that are due, sent: id and body of each."""
    outbox = stand.database.outbox
    pending = outbox.pending_webhooks(10)
    made = [
        Notification(
            id=each.notification_id, run_id="r", body=f'{{"of": "{each.outcome.id}"}}', url=URL, origin=URL
        )
        for each in pending
    ]
    outbox.enqueue_webhooks(pending, made)
    told = []
    while (notification := outbox.claim_notification("w", 60, webhooks=True)) is not None:
        told.append((notification.id, notification.body))
        outbox.complete_notification(notification, delivered=len(told) % 2 == 1, detail="answered")
    return told


def test_stored_content_equals_what_was_added(stand):
    """Whatever was asked for comes back equal; a document in another form is unreadable or differs."""
    other = replace(NEW, id=PromptId("str", "500"), webhook_url=None, requested=RequestedParameters(seed=7.0))
    stand.database.runs.enqueue([NEW, other])
    unknown = PromptId("str", "unknown")
    assert stand.database.runs.stored([NEW.id, other.id, unknown]) == {NEW.id: NEW, other.id: other}
    stand.backend.change(500, {"seed": 8, "text": 9})
    assert stand.database.runs.stored([NEW.id])[NEW.id] != NEW


@pytest.mark.parametrize("become", [completed, failed])
def test_a_finished_prompt_is_told_again_under_the_same_id(stand, become):
    """Whether it was delivered or rejected; not while it is still to be sent, and none before it is done."""
    stand.put({"_id": "a", "webhook_url": URL}, {"_id": "b", "webhook_url": URL}, {"_id": "open"})
    first, second, _ = stand.claim()
    stand.record(become(first), become(second))
    ids = [PromptId("str", name) for name in ("a", "b", "open", "unknown")]
    assert stand.database.outbox.repeat_webhooks(ids) == 0
    told = _told(stand)
    assert len(told) == 2
    assert stand.database.outbox.repeat_webhooks(ids) == 2
    assert stand.database.outbox.repeat_webhooks(ids) == 0
    assert sorted(_told(stand)) == sorted(told)


def test_what_has_no_notification_gets_one(stand):
    """A prompt finished before its address could be told, or whose notification was removed."""
    stand.put({"_id": "a", "webhook_url": URL}, {"_id": "b", "webhook_url": URL})
    first, second = stand.claim()
    stand.record(completed(replace(first, webhook_url=None)), completed(second))
    kept = stand.get("b")[WEBHOOK_ID]
    stand.backend.change("b", {WEBHOOK_PENDING: None})
    stand.backend.change("a", {WEBHOOK_ID: "not an id of ours"})
    assert stand.database.outbox.repeat_webhooks([PromptId("str", name) for name in "ab"]) == 2
    told = _told(stand)
    assert len({name for name, _ in told}) == 2
    assert kept in {name for name, _ in told}


def test_a_prompt_that_is_tried_again_forgets_the_id(stand):
    """Its next outcome is told under an id of its own."""
    stand.put({"_id": "a", "webhook_url": URL})
    stand.record(failed(stand.claim_one()))
    ((first, _),) = _told(stand)
    stand.database.runs.retry(None, ALL)
    assert WEBHOOK_ID not in stand.get("a")
    stand.record(completed(stand.claim_one()))
    ((second, _),) = _told(stand)
    assert first != second


def test_a_rejection_is_saved_once_and_told_each_time(stand):
    """The same message again makes the same notification due again, unchanged."""
    notification = Notification(id="msg_" + "0" * 32, run_id="", body="{}", url=URL, origin=URL)
    for _ in range(2):
        stand.database.outbox.repeat_notification(notification)
        stand.database.outbox.repeat_notification(replace(notification, body="[]"))
        assert _told(stand) == [(notification.id, "{}")]
