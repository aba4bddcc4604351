"""One outcome and one saved notification of any content among honest ones: these are all told, each once."""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from collections import Counter
from contextlib import closing, suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymongo.errors import PyMongoError

from tests import arbitrary
from tests.clock import Clock
from tests.contract.database_suite import MongoBackend, SqliteBackend, opened
from tests.examples import examples
from tests.unit.webhooks.stand import quickly
from text2img.databases import Collections, Notification
from text2img.databases.documents import NOTIFICATION_FIELDS
from text2img.prompts.ids import Webhook
from text2img.webhooks.delivery import CallbackPolicy, DeliveryResult, DeliveryStatus, WebhookPolicy
from text2img.webhooks.dispatcher import Dispatcher

BACKEND = "http://127.0.0.1:9"
LIMIT = 700
"""Bytes that the receiver of callbacks accepts: it refuses most of them whole."""

BOUNDED = settings(
    max_examples=examples(25),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")


def _documents(values, usual, names):
    """Documents of some of these fields, each as usual or with any value at all that a database takes."""
    fields = {name: st.just(usual[name]) | values if name in usual else values for name in names}
    if values is arbitrary.VALUES:
        fields["_id"] = st.just(usual["_id"]) | arbitrary.IDS
    return st.fixed_dictionaries({}, optional=fields).map(lambda changed: {**usual, **changed})


def _outcomes(values, mark):
    usual = {"_id": "bad", "status": "completed", "untold": mark, "run_id": "dead", "image_url": "x",
             "webhook_untold": "msg_bad", "webhook_url": BACKEND}  # fmt: skip
    failed = {**usual, "status": "error", "error_code": "safety", "error": "it was flagged"}
    names = (*NOTIFICATION_FIELDS, *usual)
    return _documents(values, usual, names) | _documents(values, failed, names)


def _notifications(values):
    usual = {"_id": "msg_odd", "run_id": "dead", "state": "due", "body": '{"results": [1, 2]}', "tries": 0}
    own = {**usual, "url": f"{BACKEND}/x", "origin": BACKEND}
    names = (*own, "not_before", "lease_expires_at", "claimed_by", "detail", "created_at", "closed_at")
    replacing = {**usual, "state": "replacing", "parts": [{"_id": "p", "state": "due", "body": "{}"}, 7]}
    return st.one_of(
        _documents(values, usual, names), _documents(values, own, names),
        _documents(values, replacing, (*names, "parts")),
    )  # fmt: skip


class Receiver:
    """A client of both kinds whose receiver reads strictly: ``told`` counts what it has accepted, by id."""

    timeout = 1.0

    def __init__(self, limit):
        self._limit = limit
        self.told = Counter()

    def send(self, notification):
        notification.body.encode("ascii")
        notification.id.encode("ascii")
        if len(notification.body) > self._limit:
            return DeliveryResult(DeliveryStatus.TOO_LARGE, "answered 413")
        with suppress(ValueError):  # the body of the odd one may be no JSON
            self._read(json.loads(notification.body, parse_constant=pytest.fail))
        return DeliveryResult(DeliveryStatus.DELIVERED, "answered 200")

    def _read(self, body):
        if isinstance(body, dict):
            told = [body.get("generation_id"), body.get("honest")]
            entries = [entry for name in ("results", "errors") for entry in body.get(name) or []]
            told += [entry["prompt_id"] for entry in entries if isinstance(entry, dict)]
            self.told.update(name for name in told if isinstance(name, str) and name.startswith("honest"))

    def progress(self, *_):
        raise AssertionError


class WebhookReceiver(Receiver):
    """The same for prompts' own webhooks."""

    def send(self, notification):
        Webhook.of(notification.url)
        return super().send(notification)


def _deliver(outbox):
    """Deliver all that is due as the end of a run does; return what was told by each kind."""
    told = []
    for kind, client in ((CallbackPolicy, Receiver(LIMIT)), (WebhookPolicy, WebhookReceiver(10**9))):
        clock = Clock()
        policy = kind(outbox, client, "run-2") if kind is CallbackPolicy else kind(outbox, client)
        dispatcher = Dispatcher(outbox, policy, "w", clock=clock, wait_for=quickly(clock))
        dispatcher.finish(5, threading.Event())
        told.append(client.told)
    return told


def _honest(mark):
    usual = {"status": "completed", "untold": mark, "run_id": "dead", "text": "a boat", "image_url": "x"}
    webhook = {"webhook_untold": "msg_honest", "webhook_url": BACKEND}
    return [
        {"_id": "honest 1", **usual, **webhook},
        {"_id": "honest 2", **usual, "status": "error", "error_code": "safety", "error": "it was flagged"},
        {"_id": "honest 3", **usual, "text": "a cat " * 50},
    ]


def _try(database, put, mark, bad):
    """Fill the database, deliver twice, and compare what was told with what is right."""
    outcome, notification, place = bad
    documents = _honest(mark)
    documents.insert(place, outcome)
    for document in documents:
        put("datasets", document)
    put("callbacks", notification)
    database.outbox.save_notification(Notification(id="msg_a", run_id="r", body='{"honest": "honest 4"}'))
    callbacks, webhooks = _deliver(database.outbox)
    assert callbacks == {f"honest {number}": 1 for number in (1, 2, 3, 4)}
    assert webhooks == {"honest 1": 1}
    assert _deliver(database.outbox) == [{}, {}]


def _value(value):
    """The value as SQLite takes it; bytes that start with T are text, mostly of another encoding."""
    return json.dumps(value) if isinstance(value, list | dict) else value


SQL_VALUES = st.one_of(
    st.none(),
    arbitrary.NUMBERS,
    arbitrary.TEXTS,
    st.binary(max_size=12),
    st.binary(max_size=12).map(b"T".__add__),
    st.sampled_from(["[" * 50_000, '{"seed": 1e999}', f'{{"seed": 1{"0" * 5000}}}', '["\\ud800"]', "NaN"]),
)


@pytest.mark.fuzz
@BOUNDED
@given(st.tuples(_outcomes(SQL_VALUES, 1), _notifications(SQL_VALUES), st.integers(0, 3)))
def test_honest_outcomes_are_told_once_on_sqlite(tmp_path_factory, bad):
    """Whatever the row beside them holds, and whatever one in the outbox does."""
    backend = SqliteBackend(tmp_path_factory.mktemp("outbox"))

    def put(table, document):
        fields = {name: _value(value) for name, value in document.items() if name != "parts"}
        places = ["CAST(? AS TEXT)" if _is_text(value) else "?" for value in fields.values()]
        values = [value[1:] if _is_text(value) else value for value in fields.values()]
        statement = f"INSERT INTO {table} ({', '.join(fields)}) VALUES ({', '.join(places)})"  # noqa: S608 - ours
        with (
            closing(sqlite3.connect(backend.file)) as connection,
            connection,
            suppress(sqlite3.IntegrityError),
        ):
            connection.execute(statement, values)  # _id may be NULL

    with closing(opened(backend.url)) as database:
        _try(database, put, 1, bad)


def _is_text(value):
    return isinstance(value, bytes) and value[:1] == b"T"


@pytest.mark.fuzz
@BOUNDED
@given(st.tuples(_outcomes(arbitrary.VALUES, mark=True), _notifications(arbitrary.VALUES), st.integers(0, 3)))
def test_honest_outcomes_are_told_once_on_mongodb(mongodb_server, bad):
    """Whatever the document beside them holds, and whatever one in the outbox does."""
    backend = MongoBackend("secantusdb", mongodb_server)
    mark = uuid.uuid4().hex[:8]
    names = Collections(*(f"{name}_{mark}" for name in ("prompts", "configs", "results", "runs", "notices")))

    def put(table, document):
        with suppress(PyMongoError):  # an id that the server refuses
            backend.database[getattr(names, table)].insert_one(document)

    with closing(opened(backend.url, names)) as database:
        _try(database, put, True, bad)
    backend.remove()
