"""A callback that a receiver finds too large is delivered in parts, each outcome once, the last one final."""

from __future__ import annotations

import json

import pytest
from werkzeug import Response

from tests.unit.webhooks.stand import CallbackStand
from text2img.databases import Notification, UndeliveredOutcome
from text2img.errors import ErrorCode
from text2img.prompts import PromptId
from text2img.webhooks.delivery import collect, split
from text2img.webhooks.payloads import callback_payload


@pytest.fixture
def stand(tmp_path, httpserver):
    stand = CallbackStand(tmp_path, httpserver)
    yield stand
    stand.close()


def limit_body(stand, size):
    """Have the receiver refuse larger bodies; return the list of those that it accepts, with their ids."""
    accepted = []

    def handle(sent):
        body = sent.get_data()
        if len(body) > size:
            return Response(status=413)
        accepted.append((sent.headers["webhook-id"], json.loads(body)))
        return Response()

    stand.server.expect_request(stand.path).respond_with_handler(handle)
    return accepted


def prompts_of(body):
    return [entry["prompt_id"] for entry in (*body["results"], *body["errors"])]


def test_parts_are_divided_until_they_fit(stand):
    """Twenty-one outcomes at a receiver of 1,000 bytes: in order, each once, the last alone final."""
    done, bad = [f"p{number:02}" for number in range(18)], ["x1", "x2", "x3"]
    stand.record(*done)
    stand.record(*bad, code=ErrorCode.SAFETY)
    accepted = limit_body(stand, 1000)
    assert collect(stand.database.outbox, "run-1", "completed", final=True) == 21
    stand.finish(30)
    assert len(accepted) == 4
    assert [name for _, body in accepted for name in prompts_of(body)] == [*done, *bad]
    assert [body["final"] for _, body in accepted] == [False] * (len(accepted) - 1) + [True]
    for _, body in accepted:
        assert (body["run_id"], body["status"]) == ("run-1", "completed")
        assert body["counts"] == {"completed": len(body["results"]), "error": len(body["errors"])}
    assert stand.left() == (0, 0)


def test_the_ids_of_parts_derive_from_the_whole(stand):
    """Each part has an id of its own that begins with the id of what it is a part of."""
    stand.record(*(f"p{number}" for number in range(4)))
    accepted = limit_body(stand, 300)
    collect(stand.database.outbox, "run-1", "completed", final=True)
    (whole,) = stand.ids()
    stand.finish(30)
    assert [name for name, _ in accepted] == [f"{whole}_{end}" for end in ("1_1", "1_2", "2_1", "2_2")]


def test_what_does_not_fit_alone_is_closed_alone(stand):
    """One outcome is too large for its receiver: it is rejected, the others are delivered."""
    stand.record("a", "b")
    stand.record("long", code=ErrorCode.SAFETY)
    stand.change("UPDATE datasets SET error = hex(zeroblob(2500)) WHERE _id = 'long'")
    accepted = limit_body(stand, 1000)
    collect(stand.database.outbox, "run-1", "completed", final=True)
    stand.finish(30)
    assert {name for _, body in accepted for name in prompts_of(body)} == {"a", "b"}
    assert stand.left() == (0, 1)
    assert stand.database.outbox.reopen_notifications() == 1


def test_a_part_that_fails_is_retried_as_it_is(stand):
    """503 for the first half: the same half comes again, with the same id and body."""
    stand.record("a", "b")
    collect(stand.database.outbox, "run-1", "completed", final=True)
    stand.respond(413, 503, 200, 200)
    stand.finish(30)
    sent = [(each.headers["webhook-id"], each.get_data()) for each in stand.requests]
    assert len(sent) == 4
    assert len(set(sent)) == 3
    assert stand.left() == (0, 0)


def test_what_an_older_version_saved_is_divided(stand):
    """Only the body is needed; fields that this version does not know are in both halves."""
    body = {"run_id": "r", "status": "stopped", "final": True, "results": [{"prompt_id": "a", "old": 1}],
            "errors": [{"prompt_id": "b"}], "counts": {"completed": 1, "error": 1}, "more": [1]}  # fmt: skip
    stand.database.outbox.save_notification(Notification(id="m", run_id="r", body=json.dumps(body)))
    accepted = limit_body(stand, len(json.dumps(body)) - 1)
    stand.finish(30)
    assert accepted == [
        ("m_1", {**body, "final": False, "errors": [], "counts": {"completed": 1, "error": 0}}),
        ("m_2", {**body, "results": [], "counts": {"completed": 0, "error": 1}}),
    ]


@pytest.mark.parametrize("body", ["[]", "7", "{}", '{"results": 7}', "{", "[" * 100_000, '{"results": [1]}'])
def test_what_cannot_be_divided_is_closed(stand, body):
    """A body that is none of ours, or has one outcome, ends as rejected, and what is behind it is sent."""
    stand.database.outbox.save_notification(Notification(id="m", run_id="r", body=body))
    stand.work("a")
    stand.respond(413, 200)
    stand.finish(30)
    assert (len(stand.requests), stand.left()) == (2, (0, 1))


def test_the_same_notification_has_the_same_parts():
    """A worker that repeats what another began makes no other parts."""
    outcomes = [UndeliveredOutcome(id=PromptId("int", str(n)), text="🌅" * n, score=0.1) for n in range(5)]
    whole = Notification(
        id="m", run_id="r", body=callback_payload("r", "running", outcomes, final=False), tries=3
    )
    assert split(whole) == split(whole)
    first, second = split(whole)
    assert (first.tries, first.origin, len(first.body) < len(whole.body)) == (0, None, True)
    assert [*map(prompts_of, map(json.loads, (first.body, second.body)))] == [["0", "1", "2"], ["3", "4"]]


def test_notifications_are_bounded_by_bytes(stand):
    """Eight outcomes of 300 kB are never one body of 2.4 MB; each is delivered once, the last one final."""
    names = [f"p{number}" for number in range(8)]
    stand.record(*names)
    stand.change("UPDATE datasets SET status = 'error', error = hex(zeroblob(150000))")
    accepted = limit_body(stand, 1_100_000)
    assert collect(stand.database.outbox, "run-1", "completed", final=True) == 8
    assert len(stand.ids()) == 3
    stand.finish(30)
    assert sorted(name for _, body in accepted for name in prompts_of(body)) == names
    assert [body["final"] for _, body in accepted] == [False, False, True]
    assert all(sent.content_length < 1_100_000 for sent in stand.requests)
