"""A message that cannot be used has reasons that name its fields; reading it never raises."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text2img.intake.entries import FIELDS, MessageReader
from text2img.prompts.parameters import PARAMETER_NAMES

HUGE = "1" + "0" * 400


@pytest.mark.parametrize("number", [HUGE, f"-{HUGE}", "7" * 5_000], ids=["positive", "negative", "long"])
@pytest.mark.parametrize(
    "field", sorted({*PARAMETER_NAMES, "priority", "style_id", "generation_id"} - {"lora"})
)
def test_a_number_beyond_every_type_is_its_fields_reason(field, number):
    """It is refused by its field's name, and not repeated."""
    fields = {"generation_id": '"g-1"', "prompt": '"a cat"', field: number}
    body = "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"
    prompt, reasons = MessageReader()(body.encode())
    assert prompt is None
    assert [reason.split()[0] for reason in reasons] == [field]
    assert len(reasons[0]) < 200


def test_a_loras_huge_weight_is_its_reason():
    """So is that of a number within a field."""
    body = f'{{"generation_id": 1, "prompt": "a cat", "lora": {{"path": "x", "weight": {HUGE}}}}}'
    assert MessageReader()(body.encode()) == (
        None,
        ["lora 1: weight must be a finite number between -10 and 10"],
    )


@pytest.mark.parametrize("field", ["width", "prompt", "prompt_tags", "lora", "generation_id"])
def test_depth_is_a_reason(field):
    """From what Python can show to what its parser cannot read: each depth has a short reason."""
    for depth in (*range(100, 1_000, 20), 10_000, 400_000):
        body = f'{{"generation_id": "g-1", "prompt": "a", "{field}": {"[" * depth}{"]" * depth}}}'
        prompt, reasons = MessageReader()(body.encode())
        assert prompt is None
        assert reasons
        assert all(len(reason) < 200 for reason in reasons)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_KEYS = st.sampled_from([*FIELDS, "generation_id", "prompt", "lora_model_url"]) | st.text(max_size=5)


@given(
    st.binary(max_size=50)
    | _VALUES.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(_KEYS, _VALUES, max_size=6).map(lambda value: json.dumps(value).encode())
    | st.integers(1, 5_000).map(lambda depth: b'{"prompt":' * depth + b"1" + b"}" * depth)
)
def test_any_message_is_a_prompt_or_has_reasons(body):
    """Nothing is raised, and the reasons are short lines."""
    prompt, reasons = MessageReader("spring")(body)
    assert (prompt is None) == bool(reasons)
    assert all(len(reason) < 300 and reason.isprintable() for reason in reasons)
