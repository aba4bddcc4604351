"""A run over documents that cannot be written back, as a process: the others are made, and it says so."""

from __future__ import annotations

import json
import uuid

import pytest
from pymongo import MongoClient

from tests.acceptance import product
from tests.acceptance.product import sleeping


@pytest.fixture
def database(mongodb_server):
    """An empty database, with its URI."""
    with MongoClient(f"{mongodb_server}/unwritable_{uuid.uuid4().hex[:8]}") as client:
        database = client.get_default_database()
        database.uri = f"{mongodb_server}/{database.name}"
        yield database


def test_a_document_that_its_schema_rejects_is_named_and_the_others_are_made(database, httpserver, tmp_path):
    """Status 3; the document stays as it is; its receiver is notified once, over two runs; the log names it
    each time.
    """
    httpserver.expect_request("/hook").respond_with_data("")
    database.datasets.insert_one({"_id": 2, "text": "a boat"})
    schema = {"$jsonSchema": {"required": ["text", "owner"]}}
    database.command("collMod", "datasets", validator=schema)
    database.datasets.insert_many({"_id": n, "text": "a boat", "owner": "ana"} for n in (1, 3, 4, 5))
    for _ in range(2):
        finished = sleeping.run(
            "--mongo-uri", database.uri, "--output", "pictures",
            "--callback-url", httpserver.url_for("/hook"), folder=tmp_path,
        )  # fmt: skip
        assert finished.returncode == 3, finished.stderr
        assert "failed 1" in finished.stdout
        assert "2 failed: the document cannot be written back" in finished.stderr
        assert "owner" in finished.stderr
    assert database.datasets.find_one({"_id": 2}) == {"_id": 2, "text": "a boat"}
    assert database.datasets.count_documents({"status": "completed"}) == 4
    told = [json.loads(sent.get_data()) for sent, _ in httpserver.log]
    errors = [error["prompt_id"] for body in told for error in body["errors"]]
    results = sorted(result["prompt_id"] for body in told for result in body["results"])
    assert (errors, results) == (["2"], ["1", "3", "4", "5"])


def test_an_index_that_rejects_the_results_ends_the_run_before_the_first_claim(database, tmp_path):
    """Status 1 and one line with the index's name; nothing is claimed or generated; doctor says the same."""
    database.datasets.insert_many({"_id": n, "text": "a boat"} for n in range(8))
    database.dataset_records.create_index([("record_no", 1)], name="record_no", unique=True)
    finished = sleeping.run("--mongo-uri", database.uri, "--output", "pictures", folder=tmp_path)
    assert finished.returncode == 1, finished.stderr
    assert "record_no" in product.errors(finished)[-1]
    assert database.datasets.count_documents({"claim_number": {"$exists": True}}) == 0
    looked = sleeping.run("doctor", "--mongo-uri", database.uri, "--output", "pictures", folder=tmp_path)
    assert looked.returncode == 1
    assert "record_no" in looked.stdout + looked.stderr
    assert database.dataset_records.count_documents({}) == 0
