"""`python -m training.shortcuts` makes what approximations are tried with: a tiny autoencoder for the demo
model (`tiny-autoencoder`), and the model itself taught to need few steps only (`few-steps`).

Interrupted, each goes on from its checkpoint in the work folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from text2img.demo.scenes import all_scenes
from training.autoencoder import encode
from training.consistency import build_few_step_scheduler, distil
from training.evaluate import MODEL
from training.pictures import draw_pictures
from training.pipeline import hush, load, save, save_part
from training.text_encoder import embed
from training.tiny_autoencoder import distil_decoder

WORK = Path("scratch/training")
TINY = Path("training/tiny_autoencoder")
FEW_STEPS = Path("scratch/few-steps")


def make_tiny_autoencoder(steps: int, pictures: int, work: Path, output: Path) -> None:
    """Distil the demo model's decoder into a tiny one."""
    student = distil_decoder(load(MODEL).vae, steps, pictures, work / "tiny_autoencoder.pt")
    save_part(student, output)


def make_few_step_model(steps: int, pictures: int, work: Path, output: Path) -> None:
    """Distil the demo model's UNet into one that needs few steps, as a whole model with LCM's scheduler."""
    pipeline = load(MODEL)
    parts = [encode(pipeline.vae, draw_pictures(1, seed=200 + turn)) for turn in range(pictures)]
    latents = torch.cat(parts).clone() * pipeline.vae.config.scaling_factor
    captions = [*(scene.caption for scene in all_scenes()), ""]
    words = embed(pipeline.text_encoder, pipeline.tokenizer, captions).clone()
    pipeline.unet = distil(pipeline.unet, latents, words, steps, work / "few_steps.pt")
    pipeline.scheduler = build_few_step_scheduler()
    save(pipeline, output)


def main() -> None:
    """Read the options and make what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m training.shortcuts", description=__doc__)
    parser.add_argument("what", choices=("tiny-autoencoder", "few-steps"))
    parser.add_argument("--output", type=Path, help=f"its folder (default: {TINY} or {FEW_STEPS})")
    parser.add_argument("--work", type=Path, default=WORK, help="for the checkpoint (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps (default: 1500 or 3000)")
    options = parser.parse_args()
    hush()
    torch.set_num_threads(1)  # the learners bring their own
    if options.what == "tiny-autoencoder":
        make_tiny_autoencoder(options.steps or 1500, 4, options.work, options.output or TINY)
    else:
        make_few_step_model(options.steps or 3000, 8, options.work, options.output or FEW_STEPS)


if __name__ == "__main__":
    main()
