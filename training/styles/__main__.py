"""`python -m training.styles` teaches the demo model the styles, a LoRA each, and measures them."""

from __future__ import annotations

import argparse
import json

import torch

from text2img.demo.scenes import all_scenes
from training.evaluate import MODEL
from training.pipeline import hush, load
from training.styles import STYLES, lora, restyle
from training.styles.learning import learn, save_lora
from training.styles.measure import FIGURES, PICTURES, measure_styles

STEPS = 400


def make(style: str) -> float:
    """Teach the demo model one style and write its LoRA; the part of the difference that is not learned."""
    pipeline = load(MODEL)
    scenes = list(all_scenes())
    captions = [*(scene.caption for scene in scenes), ""]  # the empty one stays what it is
    meant = [*(restyle(scene, style).caption for scene in scenes), ""]
    left = learn(pipeline, captions, meant, STEPS)
    save_lora(pipeline, lora(style))
    return left


def main() -> None:
    """Read the options, make the LoRAs, measure."""
    parser = argparse.ArgumentParser(prog="python -m training.styles", description=__doc__)
    parser.add_argument("--measure-only", action="store_true", help="make nothing, measure what is there")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="of each style (default: %(default)s)")
    options = parser.parse_args()
    hush()
    torch.set_num_threads(1)
    if not options.measure_only:
        for style in STYLES:
            print(f"{style}: {make(style):.1%} of the difference is left", flush=True)
    FIGURES.write_text(json.dumps(measure_styles(options.pictures), indent=2) + "\n")


if __name__ == "__main__":
    main()
