"""What holds for MongoDB alone: few commands, indexes that serve, documents of any shape."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime, timedelta

import pytest
from bson import DatetimeMS
from pymongo.errors import AutoReconnect

from tests.contract.database_suite import ALL, MINUTE, opened, texts
from tests.outcomes import completed
from text2img.databases import Collections, NewPrompt, Selection
from text2img.databases.mongo.queue import candidates_pipeline
from text2img.errors import ConfigurationError, DatabaseFailed
from text2img.prompts import PromptId, RequestedParameters


def test_a_batch_costs_six_commands(mongo_stand, counter):
    """Claim, start, extend and record of ten prompts: at most 0.6 commands a prompt."""
    mongo_stand.put(*({"_id": n} for n in range(30)))
    database = opened(mongo_stand.backend.url)
    counter.names.clear()
    while prompts := database.queue.claim("w", 10, MINUTE, ALL):
        claims = [prompt.claim for prompt in prompts]
        database.queue.start(claims)
        assert database.queue.extend(claims, MINUTE) == []
        assert len(database.queue.record([completed(prompt) for prompt in prompts], "r", notify=True)) == 10
    assert counter.names.pop() == "aggregate"  # the look that found nothing more
    assert len(counter.names) <= 0.6 * 30, counter.names
    database.close()


def test_every_tier_of_the_claim_uses_its_index(mongo_stand):
    """The server's plan for each part of the candidates' aggregation is a scan of the claim's index."""
    if mongo_stand.backend.kind == "secantusdb":
        pytest.skip(
            "SecantusDB scans the collection for compound conditions; only a real server's plan tells"
        )
    mongo_stand.put(*({"_id": n, "dataset_id": "d"} for n in range(20)))
    datasets = mongo_stand.backend.database["datasets"]
    for selection in (ALL, Selection("d")):
        first, *rest = candidates_pipeline("datasets", 10, selection)
        unions = [stage["$unionWith"]["pipeline"] for stage in rest if "$unionWith" in stage]
        for match, sort, *_ in [[first, rest[0]], *unions]:
            plan = datasets.find(match["$match"]).sort(list(sort["$sort"].items())).explain()
            assert "text2img_claim" in str(plan["queryPlanner"]["winningPlan"])
            assert "COLLSCAN" not in str(plan["queryPlanner"]["winningPlan"])


def test_the_indexes_are_there_after_opening(mongo_stand):
    """Claim, data set, untold marks, results, notices and runs each have one."""
    database = mongo_stand.backend.database
    assert {"text2img_claim", "text2img_claim_of_dataset", "text2img_untold"} <= set(
        database["datasets"].index_information()
    )
    assert database["dataset_records"].index_information()["text2img_result"]["unique"]
    assert "text2img_due" in database["callbacks"].index_information()
    assert "text2img_latest" in database["runs"].index_information()


def test_an_index_that_serves_as_well_is_taken(mongo_stand):
    """A unique index on dataset_id that its owner made under another name is no hindrance."""
    records = mongo_stand.backend.database["mine"]
    records.create_index("dataset_id", unique=True)  # not sparse: stricter than what is needed
    opened(mongo_stand.backend.url, Collections(dataset_records="mine")).close()
    assert set(records.index_information()) == {"_id_", "dataset_id_1"}


def test_results_that_stand_twice_are_a_clear_error(mongo_stand):
    """Without uniqueness a late worker could write a second result: the run does not start."""
    mongo_stand.backend.database["mine"].insert_many([{"dataset_id": 1}, {"dataset_id": 1}, {}, {}])
    with pytest.raises(DatabaseFailed, match="mine holds several results with the same dataset_id"):
        opened(mongo_stand.backend.url, Collections(dataset_records="mine"))


def test_collections_can_be_named(mongo_stand):
    """Each collection's name is an option; the default ones stay unborn."""
    names = Collections(**{field.name: f"my_{field.name}" for field in fields(Collections)})
    database = opened(f"{mongo_stand.backend.url}x", names)
    database.runs.enqueue([NewPrompt(id=PromptId("int", "1"), text="x", requested=RequestedParameters())])
    found = mongo_stand.backend.client[f"{mongo_stand.backend.name}x"].list_collection_names()
    database.close()
    assert set(found) == {"my_datasets", "my_dataset_records", "my_callbacks", "my_runs"}


def test_other_types_are_no_hindrance(mongo_stand):
    """Marks of impossible types, left by whomever, are taken for none; the prompts are claimed."""
    far = DatetimeMS(200_000_000_000_000)
    mongo_stand.put({"_id": 1, "not_before": "tomorrow"}, {"_id": 2, "not_before": 2.0})
    mongo_stand.put({"_id": 3, "deaths": "many", "attempts": "x", "claim_number": "one"})
    mongo_stand.put({"_id": 4, "status": "processing", "lease_expires_at": "soon"})
    mongo_stand.put({"_id": 5, "seed": far, "width": {"$x": 1}}, {"_id": 6, "not_before": far})
    mongo_stand.put({"_id": 7, "not_before": datetime.now(UTC) - timedelta(hours=1)})
    prompts = mongo_stand.claim()
    assert texts(prompts) == ["1", "2", "3", "5", "7", "4"]
    assert (prompts[2].deaths, prompts[2].attempts, prompts[2].claim.number) == (0, 0, 1)
    assert all(mongo_stand.database.queue.holds(prompt.claim) for prompt in prompts)


def test_numbers_stored_as_doubles_work(mongo_stand):
    """JavaScript shells store every number as a double: claim numbers and parameters go on working."""
    mongo_stand.put({"_id": 1, "claim_number": 3.0, "attempts": 1.0, "deaths": 1.0, "width": 64.0})
    prompt = mongo_stand.claim_one()
    assert (prompt.claim.number, prompt.attempts, prompt.deaths) == (4, 1, 1)
    assert len(mongo_stand.record(completed(prompt))) == 1


def test_a_broken_connection_is_tried_once_more(mongo_stand, monkeypatch):
    """When the primary steps down in the midst of a command, the method is repeated."""
    mongo_stand.put({"_id": 1})
    collection, failures = mongo_stand.database.connection.datasets, [AutoReconnect("primary stepped down")]
    aggregate = collection.aggregate

    def breaking(*args, **kwargs):
        if failures:
            raise failures.pop()
        return aggregate(*args, **kwargs)

    monkeypatch.setattr(collection, "aggregate", breaking)
    assert texts(mongo_stand.claim()) == ["1"]


@pytest.mark.parametrize("stolen", [1, 2])
def test_what_others_took_in_between_is_not_claimed(mongo_stand, monkeypatch, stolen):
    """Between the look and the claim another worker takes some, or all: the rest is claimed, or the next."""
    mongo_stand.put(*({"_id": n} for n in range(4)))
    thief = opened(mongo_stand.backend.url)
    collection, thefts = mongo_stand.database.connection.datasets, [stolen]
    aggregate = collection.aggregate

    def late(*args, **kwargs):
        found = list(aggregate(*args, **kwargs))
        if thefts:
            thief.queue.claim("w", thefts.pop(), MINUTE, ALL)  # under the same name, to make it harder
        return found

    monkeypatch.setattr(collection, "aggregate", late)
    got = mongo_stand.claim("w", 2)
    thief.close()
    expected = {"1"} if stolen == 1 else {"2", "3"}
    assert set(texts(got)) == expected
    assert all(mongo_stand.database.queue.holds(prompt.claim) for prompt in got)


def test_prompts_from_a_generator_survive_a_broken_connection(mongo_stand, monkeypatch):
    """What yields prompts once only is not asked again: none is lost when an insert is repeated."""
    collection, failures = mongo_stand.database.connection.datasets, [AutoReconnect("primary stepped down")]
    insert_many = collection.insert_many

    def breaking(*args, **kwargs):
        if failures:
            raise failures.pop()
        return insert_many(*args, **kwargs)

    monkeypatch.setattr(collection, "insert_many", breaking)
    new = (NewPrompt(id=PromptId("int", str(n)), text="x", requested=RequestedParameters()) for n in range(5))
    assert mongo_stand.database.runs.enqueue(new) == 5


def test_an_id_too_long_for_mongodb_is_a_clear_error(mongo_stand):
    """A whole number beyond 64 bits is refused with what to do about it."""
    with pytest.raises(ConfigurationError, match="write it as text"):
        mongo_stand.database.runs.enqueue(
            [NewPrompt(id=PromptId("int", str(2**70)), text="x", requested=RequestedParameters())]
        )
