"""What a database does with documents that reject a write: the others are claimed and recorded."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from tests.contract.database_suite import ALL, MINUTE, texts
from tests.outcomes import completed
from text2img.databases import Selection
from text2img.errors import DatabaseFailed, ErrorCode, WritesRejected
from text2img.prompts import Failed, request


def reject(stand, name, condition, validator):
    """Have the table or collection reject updates and inserts: by a trigger in SQLite, else by a schema."""
    if stand.backend.kind != "sqlite":
        stand.backend.database.command("collMod", name, validator=validator)
        return
    with closing(sqlite3.connect(stand.backend.file)) as connection, connection:
        for verb in ("INSERT", "UPDATE"):
            connection.execute(
                f"CREATE TRIGGER no_{verb} BEFORE {verb} ON {name} WHEN {condition} "
                "BEGIN SELECT RAISE(ABORT, 'the owner forbids it'); END"
            )


def own(stand, document_id):
    """Mark a document as its owner does."""
    if stand.backend.kind == "sqlite":
        with closing(sqlite3.connect(stand.backend.file)) as connection, connection:
            columns = {row[1] for row in connection.execute("PRAGMA table_info(datasets)")}
            if "owner" not in columns:
                connection.execute("ALTER TABLE datasets ADD COLUMN owner")
    stand.backend.change(document_id, {"owner": "ana"})


def add_unique_index(stand, name, field):
    """Give a table or collection an index of its owner's that allows each value of the field once."""
    if stand.backend.kind != "sqlite":
        stand.backend.database[name].create_index([(field, 1)], name="of_the_owner", unique=True)
        return
    with closing(sqlite3.connect(stand.backend.file)) as connection, connection:
        connection.execute(f"ALTER TABLE {name} ADD COLUMN {field} INTEGER DEFAULT 7")
        connection.execute(f"CREATE UNIQUE INDEX of_the_owner ON {name} ({field})")


@pytest.fixture
def aside():
    """The prompts that were put aside, by id, with the reasons."""
    return {}


@pytest.fixture
def put_aside(aside):
    return lambda prompt, reason: aside.__setitem__(prompt.id.text, reason)


def test_documents_that_reject_a_claim_are_put_aside_and_the_others_claimed(stand, aside, put_aside):
    """Wherever they stand in the order; they keep what they hold, and are named once in a call."""
    stand.put(*({"_id": number} for number in range(6)))
    for number in (0, 3, 5):
        own(stand, number)
    before = stand.get(0)
    reject(stand, "datasets", "OLD.owner = 'ana'", {"owner": {"$exists": False}})
    claimed = stand.database.queue.claim("w", 10, MINUTE, ALL, put_aside)
    assert sorted(texts(claimed)) == ["1", "2", "4"]
    assert all(stand.database.queue.holds(prompt.claim) for prompt in claimed)
    assert set(aside) == {"0", "3", "5"}
    assert all("cannot be written back" in reason for reason in aside.values())
    assert stand.get(0) == before


def test_a_claim_goes_past_documents_that_fill_its_limit(stand, aside, put_aside):
    """It is empty only when nothing is claimable."""
    stand.put(*({"_id": number} for number in range(4)))
    for number in range(3):
        own(stand, number)
    reject(stand, "datasets", "OLD.owner = 'ana'", {"owner": {"$exists": False}})
    assert texts(stand.database.queue.claim("w", 1, MINUTE, ALL, put_aside)) == ["3"]
    assert {"0"} <= set(aside) <= {"0", "1", "2"}  # after the first round it looks further, anywhere
    without = Selection(exclude=frozenset(prompt.id for prompt in stand.database.queue.peek(9, ALL)))
    assert stand.database.queue.claim("w", 1, MINUTE, without, put_aside) == []
    assert not stand.database.queue.has_claimable(without)
    assert stand.database.queue.pending(without) == 0


def test_without_a_place_for_them_such_a_document_is_an_error(stand):
    """The caller that cannot put anything aside hears which document it is."""
    stand.put({"_id": 1})
    own(stand, 1)
    reject(stand, "datasets", "OLD.owner = 'ana'", {"owner": {"$exists": False}})
    with pytest.raises(DatabaseFailed, match=r"^1: the document cannot be written back"):
        stand.claim()


def _record(stand, put_aside, *outcomes):
    return stand.database.queue.record(outcomes, "run-1", notify=False, put_aside=put_aside)


def test_an_outcome_that_is_rejected_is_recorded_as_a_failure(stand, aside, put_aside):
    """Where the owner forbids the completion of one prompt, it is in error; the others are completed."""
    stand.put({"_id": 1}, {"_id": 2}, {"_id": 3})
    prompts = {prompt.id.text: prompt for prompt in stand.claim()}
    own(stand, 2)
    allowed = {"$or": [{"owner": {"$exists": False}}, {"status": {"$ne": "completed"}}]}
    reject(stand, "datasets", "NEW.owner = 'ana' AND NEW.status = 'completed'", allowed)
    recorded = _record(stand, put_aside, *(completed(prompts[name]) for name in ("1", "2", "3")))
    kinds = {outcome.claim.id.text: type(outcome).__name__ for outcome in recorded}
    assert kinds == {"1": "Completed", "2": "Failed", "3": "Completed"}
    found = stand.get(2)
    assert (found["status"], found["error_code"]) == ("error", "invalid_document")
    assert stand.result(2) is None
    assert aside == {}


def test_an_outcome_that_cannot_be_recorded_at_all_is_put_aside(stand, aside, put_aside):
    """Neither completed nor in error: its prompt is named, and not among those that were recorded."""
    stand.put({"_id": 1}, {"_id": 2})
    prompts = {prompt.id.text: prompt for prompt in stand.claim()}
    own(stand, 2)
    reject(stand, "datasets", "NEW.owner = 'ana'", {"owner": {"$exists": False}})
    recorded = _record(stand, put_aside, completed(prompts["2"]), completed(prompts["1"]))
    assert [outcome.claim.id.text for outcome in recorded] == ["1"]
    assert set(aside) == {"2"}
    assert stand.result(2) is None
    assert stand.get(2)["status"] == "processing"


def test_a_result_that_is_rejected_fails_its_prompt(stand, aside, put_aside):
    """Where the results' owner forbids one of them, the reason stands in its prompt."""
    stand.put({"_id": 1}, {"_id": 2, "text": "forbidden"})
    prompts = stand.claim()
    reject(stand, "dataset_records", "NEW.prompt = 'forbidden'", {"prompt": {"$ne": "forbidden"}})
    recorded = _record(stand, put_aside, *(completed(prompt) for prompt in prompts))
    codes = {outcome.claim.id.text: getattr(outcome, "code", None) for outcome in recorded}
    assert codes == {"1": None, "2": ErrorCode.INVALID_DOCUMENT}
    assert "forbids" in stand.get(2)["error"] or "schema" in stand.get(2)["error"]
    assert stand.result(1)["status"] == "completed"


def test_a_unique_index_of_the_owners_is_not_another_workers_result(stand, put_aside):
    """It would reject every prompt in turn: its name is the error, and the run's end."""
    stand.put({"_id": 1}, {"_id": 2})
    add_unique_index(stand, "dataset_records", "record_no")
    outcomes = [completed(prompt) for prompt in stand.claim()]
    with pytest.raises(WritesRejected, match=r"record_no|of_the_owner"):
        _record(stand, put_aside, *outcomes)


def test_such_an_index_is_found_beforehand(stand):
    """Though no result is there yet; and the check leaves nothing behind."""
    stand.database.queue.check_results()
    assert stand.backend.count("dataset_records") == 0
    add_unique_index(stand, "dataset_records", "record_no")
    with pytest.raises(WritesRejected, match=r"record_no|of_the_owner"):
        stand.database.queue.check_results()
    assert stand.backend.count("dataset_records") == 0


def test_a_claim_is_tried_without_being_made(stand):
    """It names the next prompt whose document would reject it, and changes no document."""
    stand.database.queue.check_claim(ALL)
    stand.put({"_id": 1, "slug": "a"})
    before = stand.get(1)
    stand.database.queue.check_claim(ALL)
    assert (stand.get(1), stand.backend.count("datasets")) == (before, 1)
    own(stand, 1)
    reject(stand, "datasets", "OLD.owner = 'ana'", {"owner": {"$exists": False}})
    with pytest.raises(WritesRejected, match=r"^1: the document cannot be written back"):
        stand.database.queue.check_claim(ALL)
    assert stand.backend.count("datasets") == 1


def test_leases_and_releases_go_past_a_document_that_rejects_them(stand):
    """The others are extended and released; the one that cannot be counts as lost."""
    stand.put({"_id": 1}, {"_id": 2}, {"_id": 3})
    claims = {prompt.id.text: prompt.claim for prompt in stand.claim()}
    own(stand, 2)
    reject(stand, "datasets", "NEW.owner = 'ana'", {"owner": {"$exists": False}})
    stand.database.queue.start(list(claims.values()))
    assert stand.database.queue.extend(list(claims.values()), MINUTE) == [claims["2"]]
    stand.database.queue.release(list(claims.values()))
    assert [stand.get(number).get("status") for number in (1, 2, 3)] == ["pending", "processing", "pending"]


def _try(**used):
    texts = {"prompt": "a boat", "image_url": "x", "sha256": "0"}
    return [{"iteration": 1, "number": 0, **texts, "used": used}]


@pytest.mark.parametrize(
    "tries", [_try(a=[[[[1]]]]), _try(a=10**18), [{"best": 1}, 7], {"a": 1}, "text"], ids=repr
)
def test_tries_of_another_program_cost_their_prompt_at_most_its_loop(stand, tries):
    """They are read as none, or as they are: the prompt can be claimed, resolved and recorded."""
    stand.put({"_id": 1, "tries": tries})
    prompt = stand.claim_one()
    assert prompt.fault is None
    assert stand.record(completed(prompt)) != []


def test_a_document_that_cannot_be_read_fails_itself(stand, monkeypatch):
    """Whatever the error: the claim is made, and the prompt's own failure says so."""
    monkeypatch.setattr("text2img.databases.documents.tries_of", lambda value: {}[value])
    stand.put({"_id": 1, "tries": "x"})
    prompt = stand.claim_one()
    with pytest.raises(Exception, match="cannot be read") as caught:
        request(prompt, [])
    assert caught.value.code is ErrorCode.INVALID_DOCUMENT
    failed = Failed(prompt=prompt, code=caught.value.code, message=str(caught.value), attempts=1)
    assert stand.record(failed) == [failed]
