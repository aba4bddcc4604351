"""The demo's trained model: it draws what it is told, judged by pixels alone."""

from __future__ import annotations

from pathlib import Path
from random import Random

from PIL import Image

import text2img
from tests.engine.conftest import ask, draw, open_engine
from text2img.demo.judge import judge
from text2img.demo.scenes import all_scenes
from text2img.demo.scenes import draw as drawn

MODEL = Path(text2img.__file__).parent / "demo" / "model"
SIZE = {"width": 128, "height": 128}


def test_the_demo_model_draws_what_it_is_told():
    """Of 24 scenes with seeds of their own at 10 steps, 23 at least show colours, shape and size as told."""
    scenes = Random(24).sample(list(all_scenes()), 24)
    engine = open_engine(MODEL)
    asked = [
        ask(2_000_000 + n, scene.caption, num_inference_steps=10, guidance_scale=3.0, **SIZE)
        for n, scene in enumerate(scenes)
    ]
    pictures = [image for start in range(0, 24, 8) for image in draw(engine, *asked[start : start + 8])]
    seen = [judge(Image.fromarray(image.pixels)) for image in pictures]
    right = sum(one.shows(scene) for one, scene in zip(seen, scenes, strict=True))
    assert right >= 23


def test_the_demo_model_is_small_and_safe():
    """The model's folder is at most 8 MB, holds safetensors and no pickle, and names no machine."""
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert not any("_name_or_path" in path.read_text() for path in files if path.suffix == ".json")


def test_the_judge_is_right_about_drawn_pictures():
    """The judge, which all this leans on, is right about size, shape and both colours of drawn pictures."""
    chance = Random(7)
    scenes = chance.sample(list(all_scenes()), 60)
    wrong = [scene for scene in scenes if not judge(drawn(scene, chance)).shows(scene)]
    assert wrong == []
