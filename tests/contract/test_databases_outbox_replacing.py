"""Large notifications are replaced by parts, and rejected ones are opened again, on every database."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from tests.contract.database_suite import ALL, failed
from tests.outcomes import completed
from text2img.databases import Notification
from text2img.errors import WritesRejected

WEBHOOK = {"url": "https://h.example/1", "origin": "https://h.example"}


class Crash(BaseException):
    """The end of the process."""


class Dying:
    """pymongo's collection in a process that ends at the given command."""

    def __init__(self, collection, commands):
        self._collection, self._left = collection, commands

    def __getattr__(self, name):
        if not self._left:
            raise Crash
        self._left -= 1
        return getattr(self._collection, name)


def _save(stand, *names, **fields):
    for name in names:
        stand.database.outbox.save_notification(Notification(id=name, run_id="run-1", body="{}", **fields))


def _parts(notification):
    return [
        Notification(id=f"{notification.id}_{number}", run_id="run-1", body=f'"part {number}"')
        for number in (1, 2)
    ]


def _drained(stand, *, webhooks=False, delivered=True):
    """Claim and close all that is due; return the ids in order."""
    outbox, ids = stand.database.outbox, []
    while (notification := outbox.claim_notification("v", 60, webhooks=webhooks)) is not None:
        outbox.complete_notification(notification, delivered=delivered, detail="")
        ids.append(notification.id)
    return ids


def test_the_parts_take_the_place_of_the_whole(stand):
    """They are due at once, in order, before what came later, also where a part is divided again."""
    _save(stand, "n1", "n2")
    outbox = stand.database.outbox
    whole = outbox.claim_notification("w", 60)
    outbox.replace_notification(whole, _parts(whole), "answered 413")
    assert outbox.notifications() == (3, 0)
    first = outbox.claim_notification("w", 60)
    assert first == Notification(id="n1_1", run_id="run-1", body='"part 1"', tries=1)
    outbox.replace_notification(first, _parts(first), "answered 413")
    assert _drained(stand) == ["n1_1_1", "n1_1_2", "n1_2", "n2"]
    kept = stand.backend.get("n1", "callbacks")
    assert (kept["state"], kept["detail"], "body" in kept, "parts" in kept) == (
        "replaced", "answered 413", False, False,
    )  # fmt: skip


def test_a_replacement_that_is_repeated_changes_nothing(stand):
    """Not while the parts wait, not after one is delivered, not after one is itself divided."""
    _save(stand, "n1")
    outbox = stand.database.outbox
    whole = outbox.claim_notification("w", 0)
    for _ in range(2):
        outbox.replace_notification(whole, _parts(whole), "answered 413")
    first = outbox.claim_notification("w", 60)
    outbox.replace_notification(first, _parts(first), "answered 413")
    outbox.replace_notification(whole, _parts(whole), "answered 413")
    assert _drained(stand) == ["n1_1_1", "n1_1_2", "n1_2"]
    outbox.replace_notification(whole, _parts(whole), "answered 413")
    outbox.replace_notification(first, _parts(first), "answered 413")
    assert outbox.notifications() == (0, 0)
    assert stand.backend.count("callbacks") == 5


@pytest.mark.parametrize("delivered", [True, False])
def test_a_closed_notification_is_not_replaced(stand, delivered):
    """A late sender's 413 does not divide what another has delivered, or had rejected."""
    _save(stand, "n1")
    late = stand.database.outbox.claim_notification("w", 0)
    stand.database.outbox.complete_notification(late, delivered=delivered, detail="answered")
    stand.database.outbox.replace_notification(late, _parts(late), "answered 413")
    assert stand.database.outbox.notifications() == (0, int(not delivered))
    assert stand.backend.count("callbacks") == 1


def test_what_is_replaced_is_closed(stand):
    """A late answer to the whole, of any kind, leaves the parts as they are."""
    _save(stand, "n1")
    late = stand.database.outbox.claim_notification("w", 0)
    stand.database.outbox.replace_notification(late, _parts(late), "answered 413")
    stand.database.outbox.reschedule_notification(late, 0, "late")
    stand.database.outbox.complete_notification(late, delivered=False, detail="late")
    assert stand.database.outbox.reopen_notifications() == 0
    assert _drained(stand) == ["n1_1", "n1_2"]


@pytest.mark.parametrize("commands", range(5))
@pytest.mark.parametrize("repeated", [False, True])
def test_a_crash_while_replacing_makes_no_third_part(mongo_stand, commands, repeated):
    """After any command of it the process may end: each part is delivered once, or the whole is still due."""
    _save(mongo_stand, "n1")
    outbox = mongo_stand.database.outbox
    whole = outbox.claim_notification("w", 0)
    collection = outbox._callbacks
    outbox._callbacks = Dying(collection, commands)
    try:
        outbox.replace_notification(whole, _parts(whole), "answered 413")
    except Crash:
        assert commands < 4
    else:
        assert commands == 4
    finally:
        outbox._callbacks = collection
    if repeated:
        outbox.replace_notification(whole, _parts(whole), "answered 413")
    whole_is_due = commands == 0 and not repeated
    assert _drained(mongo_stand) == (["n1"] if whole_is_due else ["n1_1", "n1_2"])
    assert outbox.notifications() == (0, 0)


def test_a_replacement_under_way_counts_as_due(mongo_stand):
    """Between two commands ``status`` does not miss it; no other worker takes it before its lease is over."""
    _save(mongo_stand, "n1")
    outbox = mongo_stand.database.outbox
    whole = outbox.claim_notification("w", 60)
    collection = outbox._callbacks
    outbox._callbacks = Dying(collection, 1)
    with pytest.raises(Crash):
        outbox.replace_notification(whole, _parts(whole), "answered 413")
    outbox._callbacks = collection
    assert outbox.notifications() == (1, 0)
    assert outbox.claim_notification("v", 60) is None


def test_rejected_notifications_are_opened_again(stand):
    """Those of both kinds, under the same id and with the same body; delivered ones stay closed."""
    _save(stand, "a", "b", "c")
    _save(stand, "d", **WEBHOOK)
    outbox = stand.database.outbox
    delivered = outbox.claim_notification("w", 60)
    outbox.complete_notification(delivered, delivered=True, detail="")
    assert _drained(stand, delivered=False) == ["b", "c"]
    assert _drained(stand, webhooks=True, delivered=False) == ["d"]
    assert (outbox.notifications(), outbox.notifications(webhooks=True)) == ((0, 2), (0, 1))
    assert outbox.reopen_notifications() == 3
    assert outbox.reopen_notifications() == 0
    assert (outbox.notifications(), outbox.notifications(webhooks=True)) == ((2, 0), (1, 0))
    assert outbox.claim_notification("w", 60) == Notification(id="b", run_id="run-1", body="{}", tries=2)
    assert _drained(stand, webhooks=True) == ["d"]


def _with_texts(stand, *texts, run_id="run-1"):
    stand.put(*({"_id": f"p{number}", "text": text} for number, text in enumerate(texts)))
    stand.record(*(completed(prompt) for prompt in stand.claim(limit=len(texts))), run_id=run_id, notify=True)


def test_collecting_is_bounded_by_bytes(stand):
    """Outcomes of some 1,000 bytes: as many as fit, then the rest; none in two notifications."""
    _with_texts(stand, *["x" * 1000] * 7)
    outbox = stand.database.outbox
    first, more = outbox.collect("run-1", "n1", 10, 5000)
    second, rest = outbox.collect("run-1", "n2", 10, 1_000_000)
    assert (1 < len(first) < 5, more, rest) == (True, True, False)
    assert len(first) + len(second) == len({outcome.id for outcome in (*first, *second)}) == 7
    assert sum(outcome.size for outcome in first) <= 5000


def test_one_outcome_may_be_larger_than_the_bound(stand):
    """It has a notification of its own, and no other waits behind it forever."""
    _with_texts(stand, "x" * 5000, "y")
    outbox = stand.database.outbox
    collected = [outbox.collect("run-1", f"n{number}", 10, 1000) for number in (1, 2)]
    assert [(len(outcomes), more) for outcomes, more in collected] == [(1, True), (1, False)]


BAD_FIELDS = {
    "infinite score": {"score": float("inf")},
    "a score of no number": {"score": float("nan")},
    "a used that is a list": {"used": [1]},
    "an infinite seed": {"used": {"seed": float("inf"), "guidance_scale": float("nan")}},
    "urls that are numbers": {"image_urls": [1, None, {"a": 1}]},
    "a text that is an object": {"text": {"a": [1]}},
    "tags that are a number": {"prompt_tags": 7},
    "iterations below 0": {"iterations": -1},
    "an error that is a list": {"status": "error", "error": [1], "error_code": {"a": 1}, "attempts": "x"},
}


@pytest.mark.parametrize("kind", BAD_FIELDS)
def test_one_bad_outcome_does_not_hold_back_the_others(stand, kind):
    """An outcome whose fields another program has changed is collected beside the others."""
    _with_texts(stand, "a", "b", "c")
    stand.put(
        {"_id": "bad", "status": "completed", "run_id": "run-1", "untold": _mark(stand), **BAD_FIELDS[kind]}
    )
    outcomes, more = stand.database.outbox.collect("run-1", "n1", 10, 1_000_000)
    assert ({outcome.id.text for outcome in outcomes}, more) == ({"p0", "p1", "p2", "bad"}, False)


def _mark(stand):
    return 1 if stand.backend.kind == "sqlite" else True


def test_text_that_is_no_unicode_does_not_hold_back_the_others(sqlite_stand):
    """Run ids, texts and notification ids of another encoding cost at most their own prompts."""
    _with_texts(sqlite_stand, "a", "b", "c", "d")
    latin = "CAST(x'66fc72' AS TEXT)"
    with closing(sqlite3.connect(sqlite_stand.backend.file)) as connection, connection:
        connection.execute(f"UPDATE datasets SET run_id = {latin} WHERE _id = 'p0'")  # noqa: S608 - ours
        connection.execute(f"UPDATE datasets SET text = {latin} WHERE _id = 'p1'")  # noqa: S608 - ours
        connection.execute(f"UPDATE datasets SET webhook_untold = {latin} WHERE _id = 'p2'")  # noqa: S608 - ours
        connection.execute("UPDATE datasets SET webhook_untold = 'msg_1' WHERE _id = 'p3'")
    outbox = sqlite_stand.database.outbox
    assert outbox.undelivered_runs() == ["run-1"]
    outcomes, _ = outbox.collect("run-1", "n1", 10, 1_000_000)
    assert {outcome.id.text for outcome in outcomes} == {"p1", "p2", "p3"}
    pending = outbox.pending_webhooks(10)
    assert len(pending) == 2
    outbox.enqueue_webhooks(pending, [])
    assert sqlite_stand.database.runs.counts(ALL).pending_webhooks == 0


@pytest.mark.parametrize("fields", [{"body": None}, {"body": 7}, {"tries": "x"}, {"run_id": None}])
def test_a_changed_notification_does_not_hold_back_the_others(stand, fields):
    """Whatever another program makes of one, it is claimed and can be closed, and then the next."""
    _save(stand, "n1", "n2")
    stand.backend.change("n1", fields, "callbacks")
    assert _drained(stand, delivered=False) == ["n1", "n2"]
    assert stand.database.outbox.notifications() == (0, 2)


def test_a_notification_with_another_programs_id_is_left_alone(mongo_stand):
    """It is neither sent nor counted: it could never be closed."""
    _save(mongo_stand, "n1")
    mongo_stand.put({"_id": 7, "state": "due", "body": "{}"}, table="callbacks")
    assert mongo_stand.database.outbox.notifications() == (1, 0)
    assert _drained(mongo_stand) == ["n1"]


def test_a_failed_prompt_is_bounded_by_its_message(stand):
    """The error's message counts as the text does."""
    stand.put({"_id": 1})
    stand.record(failed(stand.claim_one()), notify=True)
    [outcome], _ = stand.database.outbox.collect("run-1", "n1", 10, 1)
    assert outcome.size > len("a boat") + len("$it was flagged")


def test_an_index_of_the_owners_loses_no_outcome(mongo_stand):
    """A unique index on another field rejects a notification: that is said, and its outcome is kept."""
    mongo_stand.backend.database["callbacks"].create_index("run_id", unique=True, name="one_a_run")
    _with_texts(mongo_stand, "a", "b")
    outbox = mongo_stand.database.outbox
    outbox.collect("run-1", "n1", 1)
    _save(mongo_stand, "n1")
    outbox.collect("run-1", "n2", 1)
    with pytest.raises(WritesRejected, match="one_a_run"):
        _save(mongo_stand, "n2")
    assert mongo_stand.database.runs.counts(ALL).undelivered == 1


def test_pending_webhooks_are_bounded_by_bytes(stand):
    """Three outcomes of 5 MB are read one by one, and none is left out."""
    stand.put(*({"_id": f"p{number}", "webhook_url": "https://h.example/1"} for number in range(3)))
    stand.record(*(completed(prompt) for prompt in stand.claim()))
    for number in range(3):
        stand.backend.change(f"p{number}", {"text": "x" * 5_000_000})
    outbox, seen = stand.database.outbox, []
    while pending := outbox.pending_webhooks(10):
        assert len(pending) == 1
        outbox.enqueue_webhooks(pending, [])
        seen += [item.outcome.id.text for item in pending]
    assert sorted(seen) == ["p0", "p1", "p2"]
