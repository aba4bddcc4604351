"""The demo's evaluator: it really looks, and reads more than the model was taught."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from text2img.demo.scenes import COLOURS, SHAPES, SIZES, Scene, draw
from text2img.errors import EvaluationFailed
from text2img.evaluation.demo import DemoEvaluator

SCENE = Scene("large", "red", "circle", "blue")


def _pixels(scene):
    return np.asarray(draw(scene, Random(1)))


def test_a_right_picture_scores_one():
    """A drawing of what the prompt says has a score of 1, and nothing to be made better."""
    found = DemoEvaluator().evaluate(_pixels(SCENE), SCENE.caption)
    assert (found.score, found.missing, found.better_prompt) == (1.0, (), None)


@pytest.mark.parametrize(
    ("wrong", "missing"),
    [
        (Scene("large", "green", "circle", "blue"), ("colour red",)),
        (Scene("large", "red", "star", "blue"), ("shape circle",)),
        (Scene("small", "red", "circle", "white"), ("size large", "background blue")),
    ],
)
def test_what_is_wrong_is_named_and_costs_its_share(wrong, missing):
    """Each of the four attributes that the picture lacks costs a quarter, and is named."""
    found = DemoEvaluator().evaluate(_pixels(wrong), SCENE.caption)
    assert found.missing == missing
    assert found.score == 1 - len(missing) / 4


@pytest.mark.parametrize(
    "text",
    ["Huge crimson disc, blue background", "a RED circle on a blue background", "big red circle, navy"],
)
def test_other_words_are_read_and_the_taught_ones_suggested(text):
    """What a person would understand is understood; suggested is the sentence that the model was taught."""
    found = DemoEvaluator().evaluate(_pixels(SCENE), text)
    assert (found.score, found.better_prompt) == (1.0, SCENE.caption)


@pytest.mark.parametrize(
    "text", ["a sunset", "a red circle", "red red circle", "red circle and square, blue"]
)
def test_what_cannot_be_read_is_not_judged(text):
    """No score is made up for a prompt that the evaluator does not understand."""
    with pytest.raises(EvaluationFailed):
        DemoEvaluator().evaluate(_pixels(SCENE), text)


def test_every_caption_of_the_demo_is_read_as_itself():
    """All 448 scenes, drawn and judged by sample, read back as they were written."""
    scenes = [
        Scene(size, colour, shape, background)
        for size in SIZES
        for colour in COLOURS
        for shape in SHAPES
        for background in COLOURS
        if colour != background
    ]
    for scene in Random(2).sample(scenes, 40):
        assert DemoEvaluator().evaluate(_pixels(scene), scene.caption).score == 1.0, scene
