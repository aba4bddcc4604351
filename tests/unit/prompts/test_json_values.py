"""Values of documents as JSON: every reader accepts it, and what JSON has no form for is null or text."""

from __future__ import annotations

import datetime as dt
import json
import math
import uuid

import pytest
from bson import Binary, Code, Decimal128, Int64, MinKey, ObjectId, Regex, Timestamp
from bson.datetime_ms import DatetimeMS
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from text2img.prompts.quoting import json_text, json_value


class Broken:
    """A value of a library that cannot be shown."""

    def __str__(self):
        raise RuntimeError


class Endless(dict):
    """A mapping that cannot be read."""

    def items(self):
        raise RuntimeError


MOMENT = dt.datetime(2026, 11, 28, 9, 0, tzinfo=dt.UTC)
AS_JSON = [
    (math.nan, None),
    (-math.inf, None),
    (2**64 - 1, 2**64 - 1),
    (-(2**63), -(2**63)),
    (2**64, "18446744073709551616"),
    (10**5000, None),
    (Int64(7), 7),
    (True, True),
    ("日の出 🌅", "日の出 🌅"),
    ("half \ud800", "half \\ud800"),
    (MOMENT, "2026-11-28T09:00:00+00:00"),
    (dt.date(2026, 11, 28), "2026-11-28"),
    (ObjectId("0123456789abcdef01234567"), "0123456789abcdef01234567"),
    (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    (b"\x00\xff", "AP8="),
    (Binary(b"\x00\xff", 5), "AP8="),
    (Decimal128("0.1"), "0.1"),
    (Code("return 1"), "return 1"),
    ((1, [2, {3}]), [1, [2, [3]]]),
    ({"a": {7: math.nan}, None: 1}, {"a": {"7": None}, "None": 1}),
    (Broken(), "Broken"),
    (Endless(a=1), None),
]


@pytest.mark.parametrize(("value", "expected"), AS_JSON, ids=[ascii(type(value)) for value, _ in AS_JSON])
def test_what_json_cannot_say_is_null_or_text(value, expected):
    """Numbers that are none are null, dates and ids are text; all else stays what it is."""
    assert json_value(value) == expected
    assert json.loads(json_text({"value": value})) == {"value": expected}


def test_nesting_is_bounded():
    """Lists and objects, 50,000 deep, neither end in an error nor make JSON that readers refuse."""
    value = []
    for _ in range(25_000):
        value = [{"a": value}]
    text = json_text(value)
    assert text.count("[") + text.count("{") == 100
    assert json.loads(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**400), 10**400) | st.floats()
    | st.text(st.characters(exclude_categories=())) | st.binary() | st.datetimes()
    | st.sampled_from([ObjectId(), DatetimeMS(10**17), MinKey(), Regex("a"), Timestamp(1, 1), Broken()]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner),
)  # fmt: skip


def _refuse(constant):
    raise AssertionError(constant)


@settings(max_examples=examples(100))
@given(VALUES)
def test_any_value_makes_json(value):
    """ASCII, without NaN, of texts that are UTF-8; and once it is JSON it stays as it is."""
    text = json_text(value)
    assert text.isascii()
    read = json.loads(text, parse_constant=_refuse)
    json.dumps(read, ensure_ascii=False).encode()
    assert json_value(read) == read
