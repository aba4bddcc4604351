"""Documents that nobody should have written: each is done or refused with a reason; no run dies of one."""

from __future__ import annotations

import json
from contextlib import closing, suppress

import bson
import pytest
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions, DatetimeConversion
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pymongo import MongoClient
from pymongo.errors import BulkWriteError

from tests import arbitrary
from tests.contract.database_suite import ALL, MongoBackend, opened
from tests.examples import examples
from tests.outcomes import DEFAULTS, completed
from tests.painter import Bench, Painter
from text2img.errors import ConfigurationError, ErrorCode, PromptFailed
from text2img.prompts import ModelConfiguration, failure, request
from text2img.webhooks.payloads import callback_payload

BOUNDED = settings(  # failures are not shrunk: each try is a whole pass on a server
    phases=[Phase.explicit, Phase.generate],
    max_examples=examples(10),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")
RAW = CodecOptions(
    tz_aware=True,
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
    uuid_representation=UuidRepresentation.STANDARD,
)


class Mongo:
    """Documents as a server keeps them, byte for byte."""

    def __init__(self, uri):
        backend = MongoBackend("secantusdb", uri)
        self.url, backend_client = backend.url, backend.client
        backend_client.close()
        self.client = MongoClient(uri)
        self.collections = self.client.get_database(backend.name, RAW)
        self.database = opened(self.url)

    def fill(self, documents, table="datasets"):
        for name in ("datasets", "dataset_records", "runs", "callbacks", "model_configs"):
            self.collections[name].delete_many({})
        with suppress(BulkWriteError):  # ids that are there already
            self.collections[table].insert_many(documents or [{"_id": 0}], ordered=False)
        return self.read(table)

    def read(self, table="datasets"):
        return {_bytes(found["_id"]): found for found in self.collections[table].find()}

    @staticmethod
    def same(one, other):
        return _bytes(one) == _bytes(other)


@pytest.fixture(scope="module")
def mongo(mongodb_server):
    """A database whose collections each example fills afresh."""
    made = Mongo(mongodb_server)
    yield made
    made.database.close()
    made.client.close()


def _bytes(value):
    """Equality that tells 7 from 7.0, and knows NaN."""
    return bson.encode({"": value}, codec_options=RAW)


def _waits(document):
    """Whether a run has to deal with the document (a lease and a not_before are never in the future here)."""
    status = document.get("status")
    texts = status if isinstance(status, list) else [status]  # MongoDB finds a list by what is in it
    return any(text is None or text == "pending" for text in texts) or "processing" in texts


def _check_settled(before, after, same):
    """Every document that waited is done, or refused with its reason; all others are untouched."""
    for key, was in before.items():
        now = after[key]
        own = set(now) - set(arbitrary.OWN) if _waits(was) else set(now)
        assert own == set(was) - (set(arbitrary.OWN) if _waits(was) else set())
        assert all(same(was[name], now[name]) for name in own), (was, now)
        if _waits(was):
            assert now["status"] in {"completed", "error"}, (was, now)
        if _waits(was) and now["status"] == "error":
            assert now["error_code"] in {*ErrorCode}
            assert now["error"].strip()
            assert "\n" not in now["error"]


@BOUNDED
@given(st.lists(arbitrary.documents(), max_size=25))
def test_no_document_harms_the_queue(mongo, documents):
    """Claimed and settled by hand, a document raises nothing but PromptFailed, and its outcome is kept."""
    before = mongo.fill(documents)
    database = mongo.database
    assert database.runs.counts(ALL).completed <= len(before)
    database.queue.peek(50, ALL)
    prompts = database.queue.claim("w", 50, 60, ALL)
    assert len(prompts) == sum(map(_waits, before.values()))
    assert database.queue.claim("other", 50, 60, ALL) == []
    database.queue.start([prompt.claim for prompt in prompts])
    assert database.queue.extend([prompt.claim for prompt in prompts], 60) == []
    outcomes = [_outcome(prompt) for prompt in prompts]
    assert database.queue.record(outcomes, "night", notify=True) == outcomes
    _check_settled(before, mongo.read(), mongo.same)
    _check_told(database)
    database.runs.retry(None, ALL)
    database.outbox.undelivered_runs()


def _outcome(prompt):
    try:
        asked = request(prompt, [DEFAULTS])
    except PromptFailed as exc:
        return failure(prompt, exc, 3)
    return completed(asked, "gs://b/x.png")


def _check_told(database):
    """Whatever counts as untold fits in a callback."""
    told, more = database.outbox.collect("night", "msg_now", 1000)
    body = json.loads(callback_payload("night", "completed", told, final=True))
    assert (len(body["results"]) + len(body["errors"]), more) == (len(told), False)


@BOUNDED
@given(st.lists(arbitrary.documents(), max_size=25))
def test_a_run_comes_to_the_end_of_any_documents(mongo, tmp_path_factory, documents):
    """A whole pass of a worker leaves every prompt completed or refused with its reason, and none waiting."""
    before = mongo.fill(documents)
    bench = Bench(tmp_path_factory.mktemp("pass"), 0, url=mongo.url)
    with closing(bench.database):
        bench.work(Painter(), notify=True)
        assert bench.counts[:2] == (0, 0)
        _check_told(bench.database)
    _check_settled(before, mongo.read(), mongo.same)


CONFIGURED = ("model_path", "revision", "variant", "safety_checker", *arbitrary.PARAMETER_NAMES)


@BOUNDED
@given(
    st.fixed_dictionaries(
        {"_id": arbitrary.IDS, "model_type": st.just("stable_diffusion")},
        optional={name: arbitrary.USUAL.get(name, st.nothing()) | arbitrary.VALUES for name in CONFIGURED},
    ),
    st.dictionaries(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
                    arbitrary.VALUES, max_size=1),
)  # fmt: skip
def test_no_model_configuration_harms_the_run(mongo, document, extra):
    """A model configuration of any content is read, or refused in one line that a person can act on."""
    mongo.fill([{**extra, **document}], "model_configs")
    said = "model configuration read"
    try:
        assert isinstance(mongo.database.runs.model_configuration(None), ModelConfiguration)
    except ConfigurationError as exc:
        said = str(exc)
    assert said.startswith("model configuration ")
    assert len(said.splitlines()) == 1
