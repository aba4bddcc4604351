"""What a message may say, and what is said of one that is wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text2img.databases import Collections, open_database
from text2img.intake.entries import MAX_BODY_BYTES, MAX_ID_CHARS, MessageReader
from text2img.prompts import PromptId


def read(message, **reader):
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return MessageReader(**reader)(body)


def good(**fields):
    prompt, invalid_value = read({"generation_id": "g-1", "prompt": "a cat", **fields})
    assert invalid_value == []
    return prompt


def test_a_whole_message_becomes_a_prompt():
    """Every field of the backend's message stands in the prompt under the job's own name."""
    prompt, invalid_value = read(
        {
            "generation_id": "g-1",
            "style_id": 7,
            "lora_model_url": "s3://loras/7.safetensors",
            "prompt_tags": ["a large red circle", "on a blue background"],
            "artist_name": "Ana Díaz",
            "seed": 9,
            "aspect_ratio": "1:2",
            "webhook_url": "https://backend.example/api",
            "negative_prompt": "blurry",
            "priority": 3,
            "width": None,
            "colour_of_the_sky": "blue",
        }
    )
    assert invalid_value == []
    assert (prompt.id, prompt.text) == (PromptId("str", "g-1"), "a large red circle on a blue background")
    assert prompt.requested.lora == {"path": "s3://loras/7.safetensors"}
    assert (prompt.requested.artist_name, prompt.requested.seed, prompt.requested.aspect_ratio) == (
        "Ana Díaz",
        9,
        "1:2",
    )
    assert (prompt.webhook_url, prompt.requested.negative_prompt) == ("https://backend.example/api", "blurry")
    assert (prompt.priority, prompt.style_id) == (3, 7)


def test_ids_may_be_whole_numbers():
    """A number stays one, as it would in a file."""
    assert good(generation_id=7).id == PromptId("int", "7")


def test_a_servers_data_set_is_that_of_its_messages():
    """A server of one data set would never see prompts without it; a message's own goes first."""
    ours, theirs = ({"generation_id": 1, "prompt": "a cat"}, {"dataset_id": "autumn"})
    assert read(ours, dataset_id="spring")[0].dataset_id == "spring"
    assert read(ours | theirs, dataset_id="spring")[0].dataset_id == "autumn"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"{", ["not JSON"]),
        (b"\xff\xfe", ["not UTF-8 text (byte 0)"]),
        (b"[" * 100_000, ["not JSON"]),
        (b" " * (MAX_BODY_BYTES + 1), ["1,048,577 bytes"]),
        ([1], ["must be a JSON object, not list"]),
        ({"prompt": "a cat"}, ["generation_id is missing"]),
        ({"generation_id": "", "prompt": "a cat"}, ["generation_id must have 1 to 500 characters"]),
        ({"generation_id": "x" * (MAX_ID_CHARS + 1), "prompt": "a cat"}, ["it has 501"]),
        ({"generation_id": "\ud800", "prompt": "a cat"}, ["generation_id contains"]),
        ({"generation_id": True, "prompt": "a cat"}, ["generation_id must be text"]),
        ({"generation_id": 2**70, "prompt": "a cat"}, ["too large"]),
        ({"generation_id": "g"}, ["text is missing"]),
        ({"generation_id": "g", "prompt": "a", "text": "b"}, ["prompt and text are the same field"]),
        ({"generation_id": "g", "prompt": "a", "lora": [], "lora_model_url": "b"}, ["_url and lora"]),
        ({"generation_id": "g", "prompt": "a", "lora_model_url": 7}, ["lora 1: path"]),
        ({"generation_id": {"$oid": "x"}, "prompt": 7, "seed": "9", "priority": "high"},
         ["generation_id must be text", "text must be text", "priority", "seed"]),
    ],
)  # fmt: skip
def test_all_that_is_wrong_is_said(message, words):
    """A message that is not valid makes no prompt, and each thing that is wrong with it has a sentence."""
    prompt, complaints = read(message)
    assert prompt is None
    assert len(complaints) == len(words)
    for complaint, word in zip(complaints, words, strict=True):
        assert word in complaint


_TEXTS = st.text(st.characters(), max_size=20)  # halves of surrogate pairs among them
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3),
)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A real database."""
    made = open_database(f"sqlite:///{tmp_path_factory.mktemp('messages')}/prompts.db", Collections())
    yield made
    made.close()


@given(
    message=st.fixed_dictionaries(
        {"generation_id": _VALUES, "prompt": _VALUES | st.just("a cat")},
        optional=dict.fromkeys(
            ("seed", "lora_model_url", "style_id", "dataset_id", "priority", "webhook_url"), _VALUES
        ),
    )
)
def test_whatever_a_message_holds(database, message):
    """It is a prompt that a database takes, or there is a reason why not; nothing is raised."""
    prompt, invalid_value = read(json.dumps(message).encode())
    assert (prompt is None) == bool(invalid_value)
    if prompt is not None:
        assert database.runs.enqueue([prompt]) in (0, 1)


@pytest.mark.parametrize(
    ("body", "errors"),
    [
        ('{"generation_id": 1, "text": "a", "seed": 1, "seed": 2}', ["seed occurs twice"]),
        ('{"generation_id": 1, "text": "a", "lora": {"path": "x", "path": "y"}}', ["path occurs twice"]),
        ('{"generation_id": 1, "te\\u0078t": "a", "text": "a"}', ["text occurs twice"]),
    ],
)
def test_a_key_that_occurs_twice_is_refused(body, errors):
    """Of two values neither is chosen, at any depth."""
    assert read(body.encode()) == (None, errors)


def test_names_of_other_programs_are_named(caplog):
    """They are ignored as all unknown fields are, and logged once; a refused message names them too."""
    reader = MessageReader()
    for _ in range(2):
        prompt, errors = reader(b'{"generation_id": 1, "prompt": "a cat", "steps": 20}')
        assert (prompt.text, errors) == ("a cat", [])
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "messages with the unknown field 'steps'; it is called num_inference_steps here; it is ignored"
    ]
    assert read({"generation_id": 1, "tags": ["a cat"]}) == (
        None,
        ["text is missing; describe the image", "unknown field 'tags'; it is called prompt_tags here"],
    )
