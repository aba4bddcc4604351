"""The styles that LoRAs are tried with: each turns every picture into one that shows something else."""

from __future__ import annotations

from random import Random

from text2img.demo.scenes import all_scenes, draw
from training.styles import PLAIN, STYLES, restyle, tell_style, undo


def test_no_two_styles_show_the_same():
    """Whatever the scene, it and its three restyled ones are four, and a style undone is the scene again."""
    for scene in all_scenes():
        assert len({scene, *(restyle(scene, style) for style in STYLES)}) == 4
        assert all(restyle(restyle(scene, style), style) == scene for style in STYLES)


def test_the_judge_tells_them():
    """Of pictures drawn by hand, each is told to be in its own style; one of another scene in none."""
    scenes, chance = list(all_scenes())[::16], Random(1)
    for scene, other in zip(scenes, [*scenes[1:], scenes[0]], strict=True):
        for style in (PLAIN, *STYLES):
            image = undo(style, draw(scene, chance))
            assert tell_style(image, scene) == style
            if other.shape != scene.shape:
                assert tell_style(image, other) is None
