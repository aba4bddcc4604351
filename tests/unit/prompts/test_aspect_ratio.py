"""Aspect ratios: which size each is, and who wins where several people ask."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts import RequestedParameters
from text2img.prompts.parameters import ASPECT_RATIOS, SIDES, resolve_parameters

OWN = RequestedParameters(num_inference_steps=50, guidance_scale=7.5, width=512, height=512)


def _size(*requested, own=OWN, multiple=8):
    settled = resolve_parameters((*requested, own), seed=0, multiple=multiple)
    return settled.width, settled.height


@pytest.mark.parametrize(
    ("ratio", "size"),
    [
        ("1:1", (512, 512)),
        ("2:2", (768, 768)),
        ("1:2", (512, 1024)),
        ("2:1", (728, 360)),
        ("3:2", (624, 416)),
        ("2:3", (416, 624)),
        ("4:3", (592, 440)),
        ("3:4", (440, 592)),
        ("16:9", (680, 384)),
        ("9:16", (384, 680)),
    ],
)
def test_sizes_of_a_model_of_512(ratio, size):
    """The three that mean a size are that size; the others have as many pixels as the model's own."""
    assert _size(RequestedParameters(aspect_ratio=ratio)) == size


def test_a_larger_models_sizes_follow_its_own():
    """On a model of 1024×1024 each is twice as long and wide, within its rounding."""
    own = RequestedParameters(num_inference_steps=1, guidance_scale=1, width=1024, height=1024)
    sizes = {
        ratio: _size(RequestedParameters(aspect_ratio=ratio), own=own, multiple=16) for ratio in ASPECT_RATIOS
    }
    assert [sizes[ratio] for ratio in SIDES] == [(1024, 1024), (1536, 1536), (1024, 2048)]
    assert sizes["16:9"] == (1360, 768)
    assert sizes["2:1"] == (1456, 720)


@given(
    st.sampled_from([ratio for ratio in ASPECT_RATIOS if ratio not in SIDES]),
    st.integers(16, 128).map(lambda eights: eights * 8),
    st.integers(16, 128).map(lambda eights: eights * 8),
    st.sampled_from([8, 16, 32]),
)
def test_ratio_and_pixels_are_kept(ratio, width, height, multiple):
    """Each side is the multiple that is nearest to the exact one, so ratio and pixels err by no more."""
    own = RequestedParameters(num_inference_steps=1, guidance_scale=1, width=width, height=height)
    across, down = map(int, ratio.split(":"))
    exact = math.sqrt(width * height * across / down), math.sqrt(width * height * down / across)
    if min(exact) < 64 + multiple:
        return
    got = _size(RequestedParameters(aspect_ratio=ratio), own=own, multiple=multiple)
    for side, wanted in zip(got, exact, strict=True):
        assert side % multiple == 0
        assert abs(side - wanted) <= multiple / 2 + 1e-6


@pytest.mark.parametrize(
    ("own", "run", "size"),
    [
        ({"aspect_ratio": "1:2"}, {"width": 256, "height": 256}, (512, 1024)),
        ({"aspect_ratio": "1:2", "width": 640, "height": 640}, {}, (640, 640)),
        ({"width": 640, "height": 320}, {"aspect_ratio": "1:2"}, (640, 320)),
        ({}, {"aspect_ratio": "1:2"}, (512, 1024)),
        ({}, {"aspect_ratio": "1:2", "width": 256}, (256, 512)),
        ({"aspect_ratio": "16:9", "width": 640}, {"height": 64}, (640, 360)),
        ({"height": 640}, {"aspect_ratio": "1:1"}, (640, 640)),
        ({"aspect_ratio": "3:2"}, {"aspect_ratio": "2:3"}, (624, 416)),
        ({"width": 640}, {"width": 256, "height": 320}, (640, 320)),
    ],
)
def test_the_most_specific_decides(own, run, size):
    """A prompt's ratio beats the run's pixels, its own pixels beat its ratio, one side alone keeps to it."""
    assert _size(RequestedParameters(**own), RequestedParameters(**run)) == size


def test_only_the_ratio_that_decided_is_recorded():
    """Where width and height say it all, the picture has no aspect ratio."""
    both = resolve_parameters((RequestedParameters(width=640, height=640, aspect_ratio="1:1"), OWN), seed=0)
    one = resolve_parameters((RequestedParameters(width=640, aspect_ratio="1:1"), OWN), seed=0)
    assert (both.aspect_ratio, one.aspect_ratio) == (None, "1:1")


@pytest.mark.parametrize("ratio", ["5:4", "1.5", 1.5, "1:1 ", ["1:1"], True])
def test_an_unknown_ratio_is_refused(ratio):
    """In a sentence that names the field and those that there are, also where pixels would win."""
    for fields in ({}, {"width": 512, "height": 512}):
        with pytest.raises(PromptFailed, match=r"^aspect_ratio must be one of 1:1, 2:2") as refused:
            resolve_parameters((RequestedParameters(aspect_ratio=ratio, **fields), OWN), seed=0)
        assert refused.value.code is ErrorCode.INVALID_PARAMETERS
