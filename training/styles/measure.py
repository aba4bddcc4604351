"""Is each style to be seen, and the scene under it? The judge says, of scenes with seeds no training saw."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from text2img.demo.scenes import all_scenes, draw
from training.evaluate import BATCH, FIRST_SEED, MODEL, Setting, choose_scenes, draw_scenes
from training.pipeline import load
from training.styles import PLAIN, STYLES, lora, tell_style, undo

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

    from text2img.demo.scenes import Scene

FIGURES = Path(__file__).parent / "figures.json"
PICTURES = 80
SETTINGS = (Setting(20, 5.0),)


def measure_styles(pictures: int) -> dict[str, object]:
    """What the judge told of each style's pictures, by setting; prints each row as soon as it is known."""
    pipeline = load(MODEL)
    for style in STYLES:
        file = lora(style)
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=style)
    scenes, rows = choose_scenes(pictures), []
    for setting in SETTINGS:
        for style in (PLAIN, *STYLES):
            _switch(pipeline, style)
            told = count(scenes, draw_scenes(pipeline, scenes, setting, BATCH))
            rows.append({"style": style, "steps": setting.steps, "guidance": setting.guidance, "told": told})
            print(rows[-1], flush=True)
    return {
        "pictures": pictures,
        "settings": rows,
        "judge_on_drawn_pictures": measure_judge(),
        "bytes": {style: lora(style).stat().st_size for style in STYLES},
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
    }


def _switch(pipeline: StableDiffusionPipeline, style: str) -> None:
    """Draw in the style from now on."""
    if style == PLAIN:
        pipeline.disable_lora()
    else:
        pipeline.enable_lora()
        pipeline.set_adapters([style])


def count(scenes: Iterable[Scene], images: Iterable[Image]) -> dict[str, int]:
    """How many pictures show their scene in which style; "none": in none."""
    told = (tell_style(image, scene) or "none" for scene, image in zip(scenes, images, strict=True))
    return dict(Counter(told).most_common())


def measure_judge() -> dict[str, dict[str, int]]:
    """The judge's own figures, on a freshly drawn picture of every scene in every style."""
    chance, scenes = Random(FIRST_SEED), list(all_scenes())
    return {
        style: count(scenes, (undo(style, draw(scene, chance)) for scene in scenes))
        for style in (PLAIN, *STYLES)
    }
