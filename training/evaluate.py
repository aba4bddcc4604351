"""Does the model draw what it is told? `python -m training.evaluate [FOLDER]` prints and writes the figures.

Every setting draws the same prompts, with seeds that no training saw, and the judge, which knows nothing of
models, says what it sees. The figures are parts of all pictures, 1 = every one.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch

from text2img.demo.judge import Seen, judge
from text2img.demo.scenes import Scene, all_scenes, draw
from training.pipeline import load

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

MODEL = Path("text2img/demo/model")
FIGURES = Path("training/figures.json")
PICTURES = 300
BATCH = 20
FIRST_SEED = 1_000_000  # the training's own seeds are small
ATTRIBUTES = tuple(field.name for field in fields(Seen))


@dataclass(frozen=True, slots=True)
class Setting:
    """How pictures are drawn; the files hold half precision whatever the arithmetic."""

    steps: int
    guidance: float
    precision: str = "float32"
    pictures: int | None = None  # the first so many only; None: all


SETTINGS = (
    Setting(10, 3.0),
    Setting(20, 3.0),
    Setting(20, 5.0),
    Setting(10, 7.5),
    Setting(20, 7.5),
    Setting(50, 7.5),
    Setting(20, 5.0, "float16", pictures=40),  # many times slower than float32 on a CPU
)


def evaluate(folder: Path, pictures: int = PICTURES) -> dict[str, object]:
    """All figures of the model in a folder; prints each row as soon as it is known."""
    scenes = choose_scenes(pictures)
    print("steps  guidance  arithmetic  " + "  ".join(f"{name:>10}" for name in (*ATTRIBUTES, "all")))
    rows = []
    for setting in SETTINGS:
        pipeline = load(folder, getattr(torch, setting.precision))
        drawn = scenes[: setting.pictures]
        row = (
            asdict(setting) | {"pictures": len(drawn)} | measure(drawn, draw_scenes(pipeline, drawn, setting))
        )
        rows.append(row)
        shown = "  ".join(f"{row[name]:10.1%}" for name in (*ATTRIBUTES, "all"))
        print(f"{setting.steps:5}  {setting.guidance:8}  {setting.precision:10}  {shown}", flush=True)
    return {
        "settings": rows,
        "judge_on_drawn_pictures": measure_judge(),
        "seconds_a_picture": seconds_a_picture(folder),
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "machine": f"{platform.machine()}, one thread",
    }


def choose_scenes(pictures: int) -> list[Scene]:
    """So many scenes, each different until all have had their turn."""
    scenes = list(all_scenes())
    Random(FIRST_SEED).shuffle(scenes)
    return [scenes[number % len(scenes)] for number in range(pictures)]


def draw_scenes(
    pipeline: StableDiffusionPipeline, scenes: list[Scene], setting: Setting, batch: int = BATCH
) -> list[Image]:
    """The model's picture of each scene, each from its own seed."""
    images: list[Image] = []
    with torch.inference_mode():
        for start in range(0, len(scenes), batch):
            part = scenes[start : start + batch]
            images += pipeline(
                [scene.caption for scene in part],
                num_inference_steps=setting.steps,
                guidance_scale=setting.guidance,
                generator=[torch.Generator().manual_seed(FIRST_SEED + start + n) for n in range(len(part))],
            ).images
    return images


def measure(scenes: Iterable[Scene], images: Iterable[Image]) -> dict[str, float]:
    """For each attribute, the part of the pictures that show it as told; "all": in every attribute."""
    differences = [judge(image).differences(scene) for scene, image in zip(scenes, images, strict=True)]
    right = {name: sum(name not in found for found in differences) for name in ATTRIBUTES}
    right["all"] = sum(not found for found in differences)
    return {name: round(count / len(differences), 4) for name, count in right.items()}


def measure_judge() -> dict[str, float]:
    """The judge's own figures, on freshly drawn pictures of every scene, twice."""
    chance = Random(FIRST_SEED)
    scenes = [*all_scenes(), *all_scenes()]
    return measure(scenes, (draw(scene, chance) for scene in scenes))


def seconds_a_picture(folder: Path, batch: int = 4) -> float:
    """How long a picture takes at 20 steps in batches of 4 on one thread; the quickest of three batches."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pipeline, setting = load(folder), Setting(20, 5.0)
    scenes, times = list(islice(all_scenes(), batch)), []
    for _ in range(3):
        begun = time.perf_counter()
        draw_scenes(pipeline, scenes, setting, batch)
        times.append(time.perf_counter() - begun)
    torch.set_num_threads(threads)
    return round(min(times) / batch, 3)


def main() -> None:
    """Measure the model in a folder, print the table, write the figures."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=MODEL)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument(
        "--figures", type=Path, default=FIGURES, help="where to write them (default: %(default)s)"
    )
    options = parser.parse_args()
    figures = evaluate(options.folder, options.pictures)
    options.figures.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
