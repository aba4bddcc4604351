"""LoRAs as documents ask for them: what is taken, what is refused in which words, what is never shown."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts import Lora
from text2img.prompts.parameters import check_loras

SIGNED = "https://bucket.s3.amazonaws.com/ink.safetensors?X-Amz-Signature=5ecret"
DIGEST = "AB" * 32


def test_one_or_a_list_is_taken():
    """A mapping is a list of one; a weight that is not given is 1; an empty list asks for none."""
    full = {"path": "b", "weight": -0.5, "sha256": DIGEST, "size": 9.0}
    assert check_loras({"path": "a"}) == (Lora("a", 1.0),)
    assert check_loras([{"path": "a", "weight": 2}, full]) == (
        Lora("a", 2.0),
        Lora("b", -0.5, DIGEST.lower(), 9),
    )
    assert check_loras([]) == ()
    assert check_loras(check_loras(full)) == check_loras(full)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (SIGNED, "lora must be {"),
        (7, "lora must be {"),
        ([SIGNED], "lora 1: must be {"),
        ([{"path": str(n)} for n in range(9)], "must not name more than 8; it names 9"),
        ([{"path": SIGNED}, {"path": SIGNED}], "the same path twice"),
        ([{"path": "a"}, {"weight": 1}], "lora 2: path is missing"),
        ({"path": " "}, "path is missing"),
        ({"path": ["a"]}, "path is missing"),
        ({"path": SIGNED + "x" * 2_000}, "must not be longer than 2,000 characters"),
        ({"path": SIGNED + "\n"}, "control character"),
        ({"path": "a", "wieght": 1}, "unknown field 'wieght'"),
        ({"path": SIGNED, "weight": "1"}, "weight must be a finite number between -10 and 10"),
        ({"path": SIGNED, "weight": True}, "weight must be"),
        ({"path": SIGNED, "weight": 10.5}, "weight must be"),
        ({"path": SIGNED, "weight": math.nan}, "weight must be"),
        ({"path": SIGNED, "sha256": "ab"}, "sha256 must be 64 hexadecimal digits"),
        ({"path": SIGNED, "size": 0}, "size must be a whole number of bytes"),
        ({"path": SIGNED, "size": 1.5}, "size must be"),
    ],
)
def test_what_is_wrong_is_named_and_no_path_is_repeated(value, words):
    """One sentence that begins with the field's name, and nothing of a URL, where a signature may stand."""
    with pytest.raises(PromptFailed) as refused:
        check_loras(value)
    said = str(refused.value)
    assert said.startswith("lora ")
    assert words in said
    assert refused.value.code is ErrorCode.INVALID_PARAMETERS
    assert "5ecret" not in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (SIGNED, "https://bucket.s3.amazonaws.com/ink.safetensors"),
        ("https://ana:5ecret@example.org/ink.safetensors#5ecret", "https://example.org/ink.safetensors"),
        ("https://example.org?key=5ecret/@x", "https://example.org"),
        ("s3://styles/ink@2.safetensors", "s3://styles/ink@2.safetensors"),
        ("/models/what?.safetensors", "/models/what?.safetensors"),
        ("artist/ink", "artist/ink"),
    ],
)
def test_what_is_recorded_holds_no_secret(path, shown):
    """A URL's user, query and fragment are cut; a file's name and a hub id stay as they are."""
    assert Lora(path, 0.5).document == {"path": shown, "weight": 0.5}


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("path"),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.sampled_from(["path", "weight", "sha256", "size"]) | st.text(), inner)
    ),
    max_leaves=12,
)


@given(ANYTHING)
def test_anything_is_read_or_refused(value):
    """Arbitrary values raise nothing but a PromptFailed of one line, and what passes is in range."""
    loras, said = (), "lora is read"
    try:
        loras = check_loras(value)
    except PromptFailed as exc:
        said = str(exc)
    assert said.startswith("lora ")
    assert len(said.splitlines()) == 1
    assert all(math.isfinite(lora.weight) and abs(lora.weight) <= 10 and lora.path for lora in loras)
