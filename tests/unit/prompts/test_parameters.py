"""The parameters: who wins, and what is refused in which words."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts import Parameters, RequestedParameters
from text2img.prompts.parameters import PARAMETER_NAMES, check_prompt_text, resolve_parameters

COMPLETE = RequestedParameters(num_inference_steps=50, guidance_scale=7.5, width=512, height=512)
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.lists(st.integers())
)


def test_the_most_specific_wish_wins_field_by_field() -> None:
    """A prompt's own field beats the run's, which beats the defaults, each field for itself."""
    own, run = RequestedParameters(width=640, seed=7), RequestedParameters(width=768, height=256)
    settled = resolve_parameters((own, run, COMPLETE), seed=1)
    assert (settled.width, settled.height, settled.seed, settled.num_inference_steps) == (640, 256, 7, 50)


def test_a_zero_is_a_wish() -> None:
    """Seed 0 and guidance 0 are wishes like any other, not the absence of one."""
    settled = resolve_parameters((RequestedParameters(seed=0, guidance_scale=0), COMPLETE), seed=99)
    assert (settled.seed, settled.guidance_scale) == (0, 0.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 65),
        ("width", 56),
        ("height", 4104),
        ("height", "512"),
        ("num_inference_steps", 0),
        ("num_inference_steps", 1001),
        ("num_inference_steps", 12.5),
        ("num_inference_steps", True),
        ("guidance_scale", math.nan),
        ("guidance_scale", math.inf),
        ("guidance_scale", -1),
        ("guidance_scale", "7"),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", "7"),
        ("scheduler", "eular"),
        ("scheduler", 3),
        ("negative_prompt", 5),
        ("negative_prompt", "a\0b"),
        ("artist_name", 7),
        ("artist_name", "Ana\nDíaz"),
        ("artist_name", "Ana\u202eDíaz"),
        ("artist_name", "half \ud800"),
        ("artist_name", "x" * 201),
        ("signature_position", "top-left"),
        ("signature_position", 1),
        ("signature_opacity", -1),
        ("signature_opacity", 256),
        ("signature_opacity", "128"),
        ("image_format", "jpg"),
        ("image_format", "PNG"),
        ("image_quality", 0),
        ("image_quality", 101),
        ("image_quality", 94.5),
    ],
)
def test_a_bad_parameter_is_refused_by_name(field: str, value: object) -> None:
    """A wrong type, range or word is refused with a sentence that begins with the field's name."""
    with pytest.raises(PromptFailed, match=f"^{field} ") as refused:
        resolve_parameters((RequestedParameters(**{field: value}), COMPLETE), seed=0)
    assert refused.value.code is ErrorCode.INVALID_PARAMETERS


@pytest.mark.parametrize(("name", "most"), [("artist_name", "200"), ("negative_prompt", "20,000")])
def test_a_text_that_is_too_long_says_both_lengths(name, most):
    """The sentence has the length that is allowed and the one that came."""
    length = int(most.replace(",", "")) + 1
    with pytest.raises(PromptFailed) as caught:
        resolve_parameters((RequestedParameters(**{name: "a" * length}), COMPLETE), seed=0)
    assert str(caught.value) == f"{name} must not be longer than {most} characters; it has {length:,}"


def test_a_blank_name_is_no_signature() -> None:
    """A prompt's blank name beats the run's; without a name nothing is said of how it would be drawn."""
    run = RequestedParameters(artist_name="Studio", signature_opacity=200, signature_position="bottom-left")
    signed = resolve_parameters((RequestedParameters(), run, COMPLETE), seed=0)
    assert (signed.artist_name, signed.signature_opacity) == ("Studio", 200)
    for blank in ("", "  "):
        plain = resolve_parameters((RequestedParameters(artist_name=blank), run, COMPLETE), seed=0)
        assert plain == resolve_parameters((COMPLETE,), seed=0)


def test_a_name_may_hold_what_scripts_need() -> None:
    """Joiners and direction marks pass, blanks around the name do not count."""
    settled = resolve_parameters((RequestedParameters(artist_name=" علی‌رضا\u200f "), COMPLETE), seed=0)
    assert settled.artist_name == "علی‌رضا\u200f"


def test_whole_doubles_are_whole_numbers() -> None:
    """30.0, as JavaScript shells store 30, is taken for the whole number that was meant."""
    settled = resolve_parameters(
        (RequestedParameters(num_inference_steps=30.0, width=640.0), COMPLETE), seed=0
    )
    assert (settled.num_inference_steps, type(settled.width)) == (30, int)


@pytest.mark.parametrize("text", [None, "", "  \n", 42, ["a cat"], "a\0cat", "half \ud800", "x" * 20_001])
def test_what_cannot_be_drawn_is_an_invalid_prompt(text: object) -> None:
    """A text that is missing, empty, no text, endless or no Unicode is ``invalid_prompt`` and says so."""
    with pytest.raises(PromptFailed, match=r"^text ") as refused:
        check_prompt_text(text)
    assert refused.value.code is ErrorCode.INVALID_PROMPT


@given(st.fixed_dictionaries(dict.fromkeys(PARAMETER_NAMES, ANYTHING)))
def test_any_document_settles_or_is_refused(fields: dict[str, object]) -> None:
    """Arbitrary values never raise anything but a PromptFailed, and what passes is in range."""
    try:
        settled = resolve_parameters((RequestedParameters(**fields), COMPLETE), seed=0)
    except PromptFailed:
        return
    assert isinstance(settled, Parameters)
    assert settled.width % 8 == settled.height % 8 == 0
    assert math.isfinite(settled.guidance_scale)
    assert 1 <= settled.num_inference_steps <= 1000
