"""Pictures of one prompt wait for each other, and become one outcome."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest

from tests.outcomes import completed
from text2img.errors import ErrorCode
from text2img.prompts import Claim, Failed, Prompt, PromptId, RequestedParameters, RetryLater, request
from text2img.worker.finish import ImageGroups

WISHES = RequestedParameters(
    num_inference_steps=1, guidance_scale=1, width=64, height=64, seed=7, num_images=3
)
PROMPT = Prompt(claim=Claim(PromptId("int", "1"), "w", 1), text="a cat")
ASKED = request(PROMPT, [WISHES]).per_image()
DONE = [completed(one, f"u{one.number}", sha256=f"s{one.number}") for one in ASKED]
FAILED = Failed(prompt=PROMPT, code=ErrorCode.SAFETY, message="flagged", attempts=1)
LATER = RetryLater(prompt=PROMPT, code=ErrorCode.GENERATION_FAILED, message="no", attempts=1, wait=2)


def _become(*results):
    """What comes of the three pictures, one after the other."""
    albums = ImageGroups()
    return [albums.add(one, became) for one, became in zip(ASKED, results, strict=True)]


def test_each_picture_has_a_seed_of_its_own():
    """Seed, seed + 1, seed + 2; all else is the same, and they may share a batch."""
    assert [(one.number, one.parameters.seed) for one in ASKED] == [(0, 7), (1, 8), (2, 9)]
    assert len({one.shape for one in ASKED}) == 1
    assert len({replace(one.parameters, seed=0) for one in ASKED}) == 1


def test_in_whatever_order_they_come_the_last_one_completes_the_prompt():
    """Until the last there is nothing; then all pictures in order, each with its own seed and hash."""
    for order in permutations(range(3)):
        albums = ImageGroups()
        *early, last = (albums.add(ASKED[number], DONE[number]) for number in order)
        assert early == [None, None]
        assert [one.image_url for one in last.images] == ["u0", "u1", "u2"]
        assert [(one.sha256, one.used["seed"]) for one in last.images] == [("s0", 7), ("s1", 8), ("s2", 9)]


@pytest.mark.parametrize(
    ("results", "outcome"),
    [
        ((DONE[0], FAILED, DONE[2]), FAILED),
        ((LATER, FAILED, None), FAILED),
        ((DONE[0], LATER, None), LATER),
        ((DONE[0], None, DONE[2]), None),
        ((None, None, None), None),
    ],
)
def test_one_outcome_for_all(results, outcome):
    """A failure is the prompt's, one for good before all; where a claim was lost there is no outcome."""
    assert _become(*results) == [None, None, outcome]


def test_what_is_spoilt_is_known_before_the_last_has_come():
    """Once a picture is missing for good, the others need not be made; once all have come it is forgotten."""
    for missing in (FAILED, LATER, None):
        albums = ImageGroups()
        albums.add(ASKED[0], DONE[0])
        assert not albums.has_failed(PROMPT.claim)
        albums.add(ASKED[1], missing)
        assert albums.has_failed(PROMPT.claim)
        albums.add(ASKED[2], None)
        assert not albums.has_failed(PROMPT.claim)


def test_a_prompt_with_one_picture_waits_for_nothing():
    """Its outcome is there at once."""
    (alone,) = request(PROMPT, [replace(WISHES, num_images=None)]).per_image()
    done = completed(alone)
    assert ImageGroups().add(alone, done) == done
