"""Ids of every kind, on every database: claimed, completed and enqueued under exactly the id they have."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

import pytest
from bson import Binary, Code, DatetimeMS, Decimal128, Int64, MaxKey, MinKey, ObjectId, Timestamp

from tests.contract.database_suite import ALL
from tests.outcomes import completed
from text2img.databases import NewPrompt, Selection
from text2img.errors import PromptFailed
from text2img.prompts import PromptId, RequestedParameters

_PLAIN = [7, "7", -1, 2**62, "a/b c.%$é", "", "$set", "507f1f77bcf86cd799439011", 1.5, 7.25]
_BSON = [
    *_PLAIN,
    ObjectId("507f1f77bcf86cd799439011"),
    Int64(2**40),
    True,
    None,
    uuid.UUID(int=7),
    Binary(b"\0" * 16, 3),
    Binary(b"x", 5),
    b"bytes",
    datetime(2026, 1, 2, 3, 4, 5, 6000, tzinfo=UTC),
    DatetimeMS(200_000_000_000_000),  # no year that Python knows
    {"a": 1, "b": {"c": [Int64(1), "$x"]}},
    Decimal128("1.50"),
    Timestamp(1, 2),
    Code("x"),
    MinKey(),
    MaxKey(),
    float("inf"),
]
_IDS = [
    PromptId("int", "7"),
    PromptId("str", "7"),
    PromptId("int", "9223372036854775807"),
    PromptId("double", "7.5"),
    PromptId("objectid", "507f1f77bcf86cd799439011"),
    PromptId("str", "507f1f77bcf86cd799439011"),
    PromptId("uuid", "00000000-0000-0000-0000-000000000007"),
    PromptId("bool", "true"),
    PromptId("null", "null"),
    PromptId("date", '{"$date": {"$numberLong": "1577836800000"}}'),
    PromptId("object", '{"a": {"$numberInt": "1"}}'),
]


def _goes_all_the_way(stand, value):
    """Claim, hold, start, extend and complete the one prompt, whose document has that id."""
    prompt = stand.claim_one()
    assert stand.database.queue.holds(prompt.claim)
    stand.database.queue.start([prompt.claim])
    assert stand.database.queue.extend([prompt.claim], 60) == []
    assert len(stand.record(completed(prompt), notify=True)) == 1
    assert stand.get(value)["status"] == "completed"
    assert stand.result(value)["prompt"] == "a boat"
    undelivered, _ = stand.database.outbox.collect("run-1", "n", 10)
    assert [each.id for each in undelivered] == [prompt.id]
    return prompt.id


@pytest.mark.parametrize("value", _BSON, ids=repr)
def test_any_bson_id_works_in_mongodb(mongo_stand, value):
    """Whatever type the owner's _id has, the prompt is claimed and completed under it."""
    mongo_stand.put({"_id": value})
    _goes_all_the_way(mongo_stand, value)


@pytest.mark.parametrize(
    "value", [*_PLAIN, float("inf"), b"bytes", b"", b"uuid:x", b"blob:00", b"int:7", b"\xff:\xff"], ids=repr
)
def test_any_id_works_in_sqlite(sqlite_stand, value):
    """Whatever type the owner's _id has, the prompt is claimed and completed under it."""
    sqlite_stand.put({"_id": value})
    _goes_all_the_way(sqlite_stand, value)


def test_ids_of_different_types_are_different_prompts(stand):
    """7 and "7" are two prompts, with two ids and two results."""
    stand.put({"_id": 7}, {"_id": "7"})
    prompts = stand.claim()
    assert [prompt.id for prompt in prompts] == [PromptId("int", "7"), PromptId("str", "7")]
    assert len(stand.record(*(completed(prompt) for prompt in prompts))) == 2
    assert stand.backend.count("dataset_records") == 2


def test_enqueued_ids_come_back_exactly(stand):
    """Ids of every kind go in and come out of the claim the same, whatever the database has for them."""
    new = [NewPrompt(id=each, text="a boat", requested=RequestedParameters()) for each in _IDS]
    assert stand.database.runs.enqueue(new) == len(_IDS)
    assert stand.database.runs.enqueue(new) == 0
    prompts = stand.claim(limit=50)
    assert {prompt.id for prompt in prompts} == set(_IDS)
    assert len(stand.record(*(completed(prompt) for prompt in prompts))) == len(_IDS)
    assert stand.database.runs.counts(ALL).completed == len(_IDS)


def test_half_a_surrogate_pair_is_an_error_in_one_line(stand):
    """Text that no encoding has a form for is refused by its prompt's id, with none of it written."""
    new = NewPrompt(id=PromptId("str", "a"), text="half \ud800", requested=RequestedParameters())
    with pytest.raises(PromptFailed, match=r"does not take 'a': .*surrogates not allowed"):
        stand.database.runs.enqueue([new])
    assert stand.backend.count("datasets") == 0


def test_an_objectid_in_text_finds_both(mongo_stand):
    """A data set's id of 24 hexadecimal digits matches as an ObjectId and as text."""
    name = "507f1f77bcf86cd799439011"
    mongo_stand.put({"_id": 1, "dataset_id": ObjectId(name)}, {"_id": 2, "dataset_id": name}, {"_id": 3})
    mongo_stand.put(
        {"_id": ObjectId(name), "model_type": "stable_diffusion", "model_path": "m"}, table="model_configs"
    )
    assert mongo_stand.database.runs.model_configuration(name).model_path == "m"
    assert mongo_stand.database.queue.pending(Selection(name)) == 2
