"""The operator's limits on what one prompt may request."""

from __future__ import annotations

import pytest

from text2img.errors import ConfigurationError, ErrorCode, PromptFailed
from text2img.prompts import Claim, Limits, Prompt, PromptId, RequestedParameters, request
from text2img.settings.loader import load

DEFAULTS = RequestedParameters(num_inference_steps=50, guidance_scale=7.5, width=512, height=512)
LARGEST = {"width": 4096, "height": 4096}


def requested(limits: Limits | None, **fields: object):
    prompt = Prompt(
        claim=Claim(PromptId("str", "1"), "w", 1), text="a cat", requested=RequestedParameters(**fields)
    )
    return request(prompt, (DEFAULTS,), limits=limits)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({**LARGEST, "num_inference_steps": 1000, "num_images": 100}, "--max-work"),
        ({**LARGEST, "num_inference_steps": 15, "num_images": 100}, "--max-work"),
        ({"num_inference_steps": 1000, "num_images": 100}, "--max-work"),
    ],
)
def test_valid_parameters_may_be_too_much_together(fields, named) -> None:
    """By default the work is bounded, though each parameter is within its own range."""
    with pytest.raises(PromptFailed, match=named) as failed:
        requested(Limits(), **fields)
    assert failed.value.code is ErrorCode.INVALID_PARAMETERS
    assert requested(None, **fields).num_images == fields["num_images"]


@pytest.mark.parametrize(
    "fields",
    [{**LARGEST, "num_inference_steps": 1000}, {"num_images": 100}, {**LARGEST, "num_images": 29}],
)
def test_the_default_limits_allow_each_maximum_alone(fields) -> None:
    """The largest image with the most steps, and the most images, are within the default limits."""
    assert requested(Limits(), **fields)


@pytest.mark.parametrize(
    ("limits", "fields", "message"),
    [
        (Limits(max_pixels=512 * 512), {"width": 520}, "520×512, 266,240 pixels; .*262,144 .--max-pixels"),
        (Limits(max_pixels=512 * 512), {"aspect_ratio": "2:2"}, "768×768"),
        (Limits(max_steps=50), {"num_inference_steps": 51.0}, "num_inference_steps is 51;.* 50 .--max-steps"),
        (Limits(max_images=4), {"num_images": 5}, "num_images is 5;.* 4 .--max-images"),
        (Limits(max_work=13.1), {}, r"50 × 0.26 megapixels is 13.1; .*13.1 .--max-work"),
    ],
)
def test_a_prompt_beyond_a_limit_is_refused(limits, fields, message) -> None:
    """The message names what was requested, the limit, and the flag that sets it."""
    with pytest.raises(PromptFailed, match=message):
        requested(limits, **fields)


def test_the_run_s_own_defaults_count_as_well() -> None:
    """A prompt that requests nothing gets the run's parameters, which must be within the limits too."""
    assert requested(Limits(max_pixels=512 * 512, max_steps=50, max_images=1, max_work=13.2))
    with pytest.raises(PromptFailed, match="--max-steps"):
        requested(Limits(max_steps=49))


@pytest.fixture
def flags(monkeypatch, tmp_path):
    """Load settings in a folder without .env files."""
    monkeypatch.chdir(tmp_path)
    return lambda **flags: load(flags)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"max_steps": "30", "num_inference_steps": "31"}, "--max-steps"),
        ({"max_pixels": "262144", "width": "1024", "height": "1024"}, "--max-pixels"),
        ({"max_images": "1", "num_images": "2"}, "--max-images"),
        ({"width": "4096", "height": "4096", "num_images": "100", "num_inference_steps": "50"}, "--max-work"),
        ({"max_pixels": "0"}, "--max-pixels"),
        ({"max_steps": "1001"}, "--max-steps"),
        ({"max_images": "101"}, "--max-images"),
        ({"max_work": "nan"}, "--max-work"),
        ({"max_work": "0"}, "--max-work"),
        ({"max_work": "many"}, "--max-work"),
    ],
)
def test_flags_beyond_the_limits_are_wrong_usage(flags, given, named) -> None:
    """The operator hears at once of flags that exceed the limits, and of limits that are none."""
    with pytest.raises(ConfigurationError, match=named):
        flags(**given)


def test_a_size_that_only_the_model_knows_is_not_refused(flags) -> None:
    """A width alone may be within the limit: the model's own height decides, when the model is known."""
    assert flags(max_pixels="262144", width="1024").limits.max_pixels == 262_144


def test_the_limits_come_from_the_environment_too(flags, monkeypatch) -> None:
    """Each limit has its variable."""
    for name, value in (("PIXELS", "65536"), ("STEPS", "20"), ("IMAGES", "3"), ("WORK", "7.5")):
        monkeypatch.setenv(f"MAX_{name}", value)
    assert flags().limits == Limits(65_536, 20, 3, 7.5)
