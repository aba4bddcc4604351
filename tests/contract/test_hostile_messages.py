"""Messages that a real RabbitMQ delivers and no sender should send: each fails at most itself."""

from __future__ import annotations

import json
import logging
import sqlite3
import struct
from contextlib import closing

import pika
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contract.test_rabbitmq import Desk, consumers_left, message
from tests.examples import examples
from tests.waiting import until
from text2img.databases import Collections, Selection, open_database
from text2img.intake.entries import FIELDS, MessageReader
from text2img.intake.rabbitmq import REASON_HEADER


class RawHeaders(pika.BasicProperties):
    """Properties with headers as they are on the wire: pika does not encode all that a sender can."""

    def __init__(self, table, **properties):
        super().__init__(delivery_mode=2, headers={}, **properties)
        self._table = table

    def encode(self):
        plain = b"".join(super().encode())
        flags, start = struct.unpack(">H", plain[:2])[0], 2
        for flag in (self.FLAG_CONTENT_TYPE, self.FLAG_CONTENT_ENCODING):
            if flags & flag:
                start += 1 + plain[start]
        table = struct.pack(">I", len(self._table)) + self._table
        return [plain[:start] + table + plain[start + 4 :]]


def entry(name, value):
    """One entry of a table: the name as a short string, and the value with its type."""
    encoded = name.encode()
    return bytes([len(encoded)]) + encoded + value


def array(items):
    """An array of values that are encoded already."""
    return b"A" + struct.pack(">I", len(items)) + items


def nested(depth):
    """Arrays in arrays."""
    value = array(b"")
    for _ in range(depth):
        value = array(value)
    return value


YEAR_10000 = b"T" + struct.pack(">Q", 253_402_300_800)


def publish(desk, body, table, **properties):
    desk.server.publish(desk.queue)  # declares it
    with desk.server.connection() as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.basic_publish("", desk.queue, body, RawHeaders(table, **properties), mandatory=True)


@pytest.fixture
def desk(tmp_path, rabbitmq):
    """A desk with nothing on it."""
    database = open_database(f"sqlite:///{tmp_path}/prompts.db", Collections())
    yield Desk(rabbitmq, database)
    database.close()


@pytest.mark.parametrize(
    "table",
    [
        entry("when", YEAR_10000),
        entry("when", b"T" + b"\xff" * 8),
        entry("in", array(YEAR_10000)),
        entry("deep", nested(5_000)),
        entry("\u00e9", b"S" + struct.pack(">I", 2) + b"\xff\xfe"),
    ],
    ids=["year-10000", "latest", "in-an-array", "deep", "not-utf8"],
)
def test_headers_are_not_the_jobs(desk, caplog, table):
    """Whatever stands in the headers, a good message becomes a prompt, on the same connection."""
    with caplog.at_level(logging.WARNING, "text2img"), consumers_left(desk, 0), desk.consuming():
        publish(desk, json.dumps(message(1)).encode(), table)
        desk.publish(message(2))
        desk.await_prompts(2)
    assert caplog.text == ""


def test_a_bad_message_with_undecodable_headers_is_one_dead_letter(desk):
    """Its other properties are kept, those before the headers and those behind them."""
    with consumers_left(desk, 0), desk.consuming():
        publish(desk, b"{", entry("when", YEAR_10000), content_type="text/x", message_id="m-1", type="t")
        desk.publish(message(1))
        desk.await_prompts(1)
        until(lambda: desk.server.ready(desk.dead) == 1)
    ((properties, body),) = desk.server.taken(desk.dead)
    assert (body, list(properties.headers)) == (b"{", [REASON_HEADER])
    assert (properties.content_type, properties.message_id, properties.type) == ("text/x", "m-1", "t")


def test_a_dead_letter_goes_to_one_queue(desk):
    """What a broker acts upon in the sender's headers and properties is not published again."""
    copy = desk.server.queue()
    desk.server.publish(copy)
    routing = {
        "CC": [copy],
        "x-death": [{"queue": copy, "count": 3}],
        "x-first-death-queue": copy,
        REASON_HEADER: "all is well",
        "x-trace": "t-1",
        "traceparent": "00-1",
    }
    with consumers_left(desk, 0), desk.consuming():
        desk.publish(
            {"prompt": 7}, headers=routing, expiration="86400000", reply_to="q", user_id="guest", app_id="a"
        )
        until(lambda: desk.server.ready(desk.dead) == 1)
    assert desk.server.ready(copy) == 1  # the sender's own
    ((properties, _),) = desk.server.taken(desk.dead)
    assert sorted(properties.headers) == ["traceparent", REASON_HEADER, "x-trace"]
    assert "generation_id is missing" in properties.headers[REASON_HEADER]
    assert (properties.expiration, properties.reply_to, properties.user_id) == (None, None, None)
    assert (properties.app_id, properties.delivery_mode) == ("a", 2)


@pytest.mark.parametrize("size", [3_000, 130_800])
def test_a_dead_letter_fits_a_frame(desk, caplog, size):
    """With large headers and everything wrong, it has a shorter reason and none of these headers."""
    everything = dict.fromkeys(FIELDS, "\u00e9\ud800" * 500)
    with caplog.at_level(logging.WARNING, "text2img"), consumers_left(desk, 0), desk.consuming():
        desk.publish(everything, headers={"large": "x" * size})
        desk.publish(message(1))
        desk.await_prompts(1)
        until(lambda: desk.server.ready(desk.dead) == 1)
    assert "retrying" not in caplog.text
    ((properties, body),) = desk.server.taken(desk.dead)
    assert list(properties.headers) == [REASON_HEADER]
    assert "generation_id is missing" in properties.headers[REASON_HEADER]
    assert len(properties.headers[REASON_HEADER].encode()) <= 2_000
    assert json.loads(body) == everything


def test_a_prompt_that_the_database_cannot_store_is_a_dead_letter(desk):
    """Those that were to be added with it are added without it."""

    def add(prompts):
        if any(str(prompt.id) == "g-2" for prompt in prompts):
            raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")
        desk.database.runs.enqueue(prompts)

    desk.publish(*map(message, range(5)), {"prompt": 7})
    with consumers_left(desk, 0), desk.consuming(add=add):
        desk.await_prompts(4)
        until(lambda: desk.server.ready(desk.dead) == 2)
    reasons = {letter.headers[REASON_HEADER] for letter, _ in desk.server.taken(desk.dead)}
    assert "the database cannot store it (UnicodeEncodeError)" in reasons


def test_a_prompt_that_the_owner_forbids_is_a_dead_letter(desk, tmp_path):
    """It was delivered again and again, and held up those behind it."""
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as shell, shell:
        shell.execute(
            "CREATE TRIGGER forbid BEFORE INSERT ON datasets WHEN NEW.seed = 2 "
            "BEGIN SELECT RAISE(ABORT, 'the owner forbids it'); END"
        )
    desk.publish(*map(message, range(5)))
    with consumers_left(desk, 0), desk.consuming():
        desk.await_prompts(4)
        until(lambda: desk.server.ready(desk.dead) == 1)
    ((letter, _),) = desk.server.taken(desk.dead)
    assert letter.headers[REASON_HEADER] == "the database does not take 'g-2': the owner forbids it"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_NAMES = st.sampled_from([*FIELDS, "generation_id", "prompt", "lora_model_url"]) | st.text(max_size=5)
_BODIES = st.one_of(
    st.binary(max_size=50),
    st.dictionaries(_NAMES, _JSON, max_size=5).map(lambda fields: json.dumps(fields).encode()),
    st.integers(1, 3_000).map(lambda depth: b'{"prompt":' * depth + b"1" + b"}" * depth),
)
_HEADER_VALUES = st.recursive(
    st.one_of(
        st.integers(0, 2**64 - 1).map(lambda seconds: b"T" + struct.pack(">Q", seconds)),
        st.binary(max_size=300).map(lambda text: b"S" + struct.pack(">I", len(text)) + text),
        st.integers(-(2**63), 2**63 - 1).map(lambda number: b"l" + struct.pack(">q", number)),
        st.floats(allow_nan=False, allow_infinity=False).map(lambda number: b"d" + struct.pack(">d", number)),
        st.builds(lambda scale, number: b"D" + struct.pack(">BI", scale, number), st.integers(0, 255),
                  st.integers(0, 2**31)),
        st.integers(0, 2_000).map(nested),
        st.just(b"V"),
    ),
    lambda inner: st.lists(inner, max_size=3).map(lambda items: array(b"".join(items))),
    max_leaves=4,
)  # fmt: skip
_TABLES = st.dictionaries(
    st.sampled_from(["x-trace", "x-death", "when", "\u00e9", REASON_HEADER]), _HEADER_VALUES, max_size=3
).map(lambda headers: b"".join(entry(name, value) for name, value in headers.items()))


@settings(max_examples=examples(10), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=_BODIES, table=_TABLES, place=st.integers(0, 3))
def test_one_bad_message_among_honest_ones(desk, body, table, place):
    """The honest ones become prompts, all are acknowledged, and the bad one is a prompt or a dead letter."""
    before, letters = desk.prompts(), desk.server.ready(desk.dead) or 0
    honest = [{**message(1), "generation_id": f"honest {before}-{number}"} for number in range(3)]
    prompt, _ = MessageReader()(body)
    expected = {each["generation_id"] for each in honest} | ({str(prompt.id)} if prompt else set())

    def waiting():
        return {str(each.id) for each in desk.database.queue.peek(10_000, Selection())}

    desk.publish(*honest[:place])
    publish(desk, body, table)
    desk.publish(*honest[place:])
    with consumers_left(desk, 0), desk.consuming():
        until(lambda: expected <= waiting())
        until(lambda: (desk.server.ready(desk.dead) or 0) == letters + (prompt is None))
