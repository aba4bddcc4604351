"""The published schema and the checks say the same of every entry."""

from __future__ import annotations

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from tests.examples import examples
from text2img.intake.entries import FIELDS, new_prompt
from text2img.intake.schema import schema

SCHEMA = schema()
VALIDATOR = Draft202012Validator(SCHEMA)
ENTRY = VALIDATOR.evolve(schema={"$ref": "#/$defs/entry", "$defs": SCHEMA["$defs"]})

_TEXTS = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "a cat",
            "pending",
            "euler",
            "png",
            "bottom-left",
            "16:9",
            "2:3",
            "\0",
            "a" * 201,
            "7",
            "\u2028",
            "https://backend.example/x",
            "http://b\n",
            "http://me@b",
            "http://b/ü?",
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)
_NUMBERS = st.one_of(
    st.sampled_from([0, 1, 7, 8, 64, 100, 101, 255, 256, 512, 1000, 1001, 4096, 4104, 2**63, -1, 2**63 - 1]),
    st.floats(-1e10, 1e10),
    st.sampled_from([8.0, 0.5, 30.0, -(2.0**63)]),
)
_LORA = st.fixed_dictionaries(
    {},
    optional={
        "path": _TEXTS,
        "weight": st.one_of(st.none(), _NUMBERS),
        "sha256": st.sampled_from([None, "a" * 64, "A" * 64, "b" * 63, 7]),
        "size": st.one_of(st.none(), _NUMBERS),
        "more": st.none(),
    },
)
_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    _NUMBERS,
    _TEXTS,
    st.lists(st.one_of(_TEXTS, _NUMBERS, _LORA), max_size=9),
    _LORA,
    st.sampled_from([{"$oid": "5" * 24}, {"$uuid": "a" * 32}, {"$oid": "5"}, {"$oid": 7}, {}]),
)
_ENTRIES = st.one_of(
    _VALUES,
    st.dictionaries(st.sampled_from([*FIELDS, "texts"]), _VALUES, max_size=5),
    st.builds(
        lambda more: {"text": "a cat", **more}, st.dictionaries(st.sampled_from(FIELDS), _VALUES, max_size=2)
    ),
)


@settings(max_examples=examples(200))
@given(_ENTRIES)
@example({"text": "a", "id": None, "_id": 7})
@example({"text": None, "prompt_tags": ["a"]})
@example({"text": "a", "lora": []})
@example({"text": "a", "width": 64.0})
@example({"text": "a cat", "artist_name": "http://b\n"})
@example({"text": "a cat", "lora": {"path": "ink", "sha256": "a" * 64 + "\n"}})
@example({"text": "a cat", "id": {"$oid": "5" * 24 + "\n"}})
@example({"text": "a cat", "id": {"$uuid": "a" * 32 + "\n"}})
@example({"text": "a cat", "webhook_url": "http://b\n"})
def test_the_schema_takes_what_the_checks_take(entry):
    """Whatever an entry holds, the schema takes it if and only if the checks do, line for line."""
    prompt, complaints = new_prompt(entry)
    # What concerns two values at once, no schema can say.
    assume(not any("path twice" in said or "must leave room" in said for said in complaints))
    assert ENTRY.is_valid(entry) == (prompt is not None), complaints


def test_the_schema_is_one():
    """It is a schema by the rules of its own draft, and knows every field that the checks know."""
    Draft202012Validator.check_schema(SCHEMA)
    assert set(SCHEMA["$defs"]["prompt"]["properties"]) == set(FIELDS)


@pytest.mark.parametrize(
    ("document", "good"),
    [(["a cat", {"text": "a dog"}], True), ({"prompts": ["a cat"]}, True), ([7], False), ({"x": []}, False)],
)
def test_whole_files(document, good):
    """A file is a list, or a mapping with the list under ``prompts``."""
    assert VALIDATOR.is_valid(document) is good
