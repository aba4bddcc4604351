"""`python -m training` makes the demo model again; after an interruption it goes on where it was."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from text2img.demo.scenes import all_scenes
from training.autoencoder import encode, sharpen, train_autoencoder
from training.diffusion import train_unet
from training.evaluate import FIGURES, MODEL, evaluate
from training.pictures import draw_pictures
from training.pipeline import assemble, hush, save
from training.text_encoder import embed, train_text_encoder
from training.tokenizer import build_tokenizer

WORK = Path("scratch/training")
FAST_WORK = Path("scratch/fast-training")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long each part learns, and from how many pictures of each of the 448 scenes."""

    autoencoder_steps: int = 2600
    sharpening_steps: int = 1500
    autoencoder_pictures: int = 8
    text_encoder_steps: int = 400
    unet_steps: int = 4200
    unet_pictures: int = 24


FAST = Recipe(
    autoencoder_steps=2,
    sharpening_steps=2,
    autoencoder_pictures=1,
    text_encoder_steps=2,
    unet_steps=2,
    unet_pictures=1,
)  # for trying out the way, not the model


def make(recipe: Recipe, work: Path, output: Path) -> None:
    """Train the three parts, each from its checkpoint in `work` if there is one, and save the pipeline."""
    tokenizer = build_tokenizer()
    print("The text encoder")
    text_encoder = train_text_encoder(tokenizer, recipe.text_encoder_steps, work / "text_encoder.pt")
    print("The autoencoder")
    autoencoder = train_autoencoder(
        recipe.autoencoder_steps, recipe.autoencoder_pictures, work / "autoencoder.pt"
    )
    sharpen(autoencoder, recipe.sharpening_steps, recipe.autoencoder_pictures, work / "decoder.pt")
    print("The UNet")
    words = embed(text_encoder, tokenizer, [*(scene.caption for scene in all_scenes()), ""])
    # Drawn and encoded in turns: the pictures would fill half a gigabyte, their latents a tenth of it.
    parts = [encode(autoencoder, draw_pictures(1, seed=100 + turn)) for turn in range(recipe.unet_pictures)]
    # Cloned: tensors made in inference mode cannot take part in training.
    latents = torch.cat(parts).clone() * autoencoder.config.scaling_factor
    unet = train_unet(latents, words.clone(), recipe.unet_steps, work / "unet.pt")
    save(assemble(tokenizer, text_encoder, unet, autoencoder), output)


def main() -> None:
    """Read the options, train, measure."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--output", type=Path, help=f"the model's folder (default: {MODEL})")
    parser.add_argument("--work", type=Path, help=f"for the checkpoints (default: {WORK})")
    parser.add_argument(
        "--fast", action="store_true", help=f"two steps of each part, in {FAST_WORK}: tries the way only"
    )
    parser.add_argument(
        "--evaluate-only", action="store_true", help="train nothing, measure the model in --output"
    )
    options = parser.parse_args()
    hush()
    torch.set_num_threads(1)  # the learners bring their own
    if options.fast:  # elsewhere, so that trying the way never replaces the model
        make(FAST, options.work or FAST_WORK, options.output or FAST_WORK / "model")
        return
    output = options.output or MODEL
    if not options.evaluate_only:
        make(Recipe(), options.work or WORK, output)
    FIGURES.write_text(json.dumps(evaluate(output), indent=2) + "\n")


if __name__ == "__main__":
    main()
