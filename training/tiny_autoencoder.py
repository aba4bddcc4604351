"""A tiny autoencoder whose decoder does for the demo's latents what the real one does, in less time.

Distilled as TAESD is from Stable Diffusion's: the small decoder learns to draw what the large one draws of
the same latents. Its encoder stays untrained and as small as it goes: only decoding is wanted here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch.nn import functional

from training.autoencoder import disturb, encode
from training.pictures import draw_pictures
from training.schedule import Course, Learner

if TYPE_CHECKING:
    from pathlib import Path

WIDTH = 16  # channels at every level; the large decoder has 64 … 16
BLOCKS = (4, 3, 2, 1)  # at 16, 32, 64 and 128 pixels a side
BATCH = 8


def build_tiny_autoencoder() -> AutoencoderTiny:
    """An untrained one of 0.1 million parameters, which takes latents as the UNet leaves them."""
    return AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4,
        num_encoder_blocks=(0,) * 4,
        decoder_block_out_channels=(WIDTH,) * 4,
        num_decoder_blocks=BLOCKS,
    )


def distil_decoder(teacher: AutoencoderKL, steps: int, each: int, checkpoint: Path) -> AutoencoderTiny:
    """A tiny autoencoder taught on latents of ``each`` pictures a scene, disturbed as in ``sharpen``."""
    torch.manual_seed(4)
    student, factor = build_tiny_autoencoder(), teacher.config.scaling_factor
    teacher = teacher.eval().requires_grad_(requires_grad=False)
    latents = encode(teacher, draw_pictures(each, seed=4)).clone()
    centre = latents.mean(dim=(0, 2, 3), keepdim=True)
    learner = Learner(student, Course(steps), checkpoint)
    chance = torch.Generator().manual_seed(learner.step)

    def loss(disturbed: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            drawn = teacher.decode(disturbed).sample.clamp(-1, 1)
        tried = student.decode(disturbed * factor).sample
        return functional.mse_loss(tried, drawn) + 0.3 * functional.l1_loss(tried, drawn)

    for _ in learner.steps():
        picks = torch.randint(len(latents), (BATCH,), generator=chance)
        learner.learn(loss, disturb(latents[picks], centre, chance))
    return student.eval()
