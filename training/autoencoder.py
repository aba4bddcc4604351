"""The autoencoder: 128 × 128 pixels ↔ 16 × 16 latents of 4 channels. Knows nothing of captions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL
from torch.nn import ModuleDict, functional

from training.pictures import WIDTH, draw_pictures, to_floats
from training.schedule import Course, Learner

if TYPE_CHECKING:
    from pathlib import Path

CHANNELS = (16, 32, 48, 64)  # each but the first halves the picture: a factor of 8
CROP = 64
# Most steps see quarters of pictures: four times the variety for the same work. The last see whole ones, so
# that the attention in the middle learns the 16 × 16 latents it will be used on.
CROPPED_PART = 0.8
BATCH = 32
SHARPENING_BATCH = 8
# A UNet's latents are not exact, and guidance stretches them beyond any picture's: a decoder that has seen
# neither answers with halos and blotches.
SHARPENING_NOISE = 0.25  # at most, in the latents' own units
SHARPENING_STRETCH = (0.9, 1.5)  # away from the mean latent
KL_WEIGHT = 1e-5


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder of 0.86 million parameters."""
    return AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=WIDTH,
    )


def train_autoencoder(steps: int, each: int, checkpoint: Path) -> AutoencoderKL:
    """An autoencoder trained on `each` pictures of every scene, its scaling factor set."""
    torch.manual_seed(1)
    autoencoder = build_autoencoder()
    learner = Learner(autoencoder, Course(steps), checkpoint)
    pictures = draw_pictures(each, seed=1)
    chance = torch.Generator().manual_seed(learner.step)

    def loss(batch: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            posterior = autoencoder.encode(batch).latent_dist
            restored = autoencoder.decode(posterior.mean + posterior.std * noise).sample.float()
        difference = functional.mse_loss(restored, batch) + 0.3 * functional.l1_loss(restored, batch)
        return difference + KL_WEIGHT * posterior.kl().float().mean()

    for step in learner.steps():
        cropped = step < CROPPED_PART * steps
        batch = to_floats(_choose(pictures, chance, cropped=cropped))
        across = batch.shape[-1] // 8
        learner.learn(loss, batch, torch.randn(len(batch), 4, across, across, generator=chance))
    autoencoder.eval()
    latents = encode(autoencoder, pictures[:448])
    # Diffusion expects latents of unit spread; the pipeline multiplies and divides by this factor.
    autoencoder.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return autoencoder


def sharpen(autoencoder: AutoencoderKL, steps: int, each: int, checkpoint: Path) -> None:
    """Teach the decoder alone, in place, to draw clean edges from the latents as they now are.

    While both halves learn, the decoder sees each latent through the encoder's own wide noise and answers
    with edges a little soft. The latents do not change here: the UNet may be trained before or after.
    """
    autoencoder.encoder.requires_grad_(requires_grad=False)
    pictures = draw_pictures(each, seed=1)
    latents = encode(autoencoder, pictures).clone()
    centre = latents.mean(dim=(0, 2, 3), keepdim=True)
    decoder = ModuleDict({"decoder": autoencoder.decoder, "post_quant_conv": autoencoder.post_quant_conv})
    learner = Learner(decoder, Course(steps, peak=1e-3), checkpoint)
    chance = torch.Generator().manual_seed(learner.step)

    def loss(disturbed: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            restored = autoencoder.decode(disturbed).sample.float()
        return functional.mse_loss(restored, batch) + 0.3 * functional.l1_loss(restored, batch)

    for _ in learner.steps():
        picks = torch.randint(len(pictures), (SHARPENING_BATCH,), generator=chance)
        learner.learn(loss, disturb(latents[picks], centre, chance), to_floats(pictures[picks]))


def disturb(latents: torch.Tensor, centre: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """Latents (n, 4, 16, 16) as a guided UNet might leave them, stretched and noisy by varying amounts."""
    stretch, amount = torch.rand(2, len(latents), 1, 1, 1, generator=chance)
    least, greatest = SHARPENING_STRETCH
    stretched = centre + (least + (greatest - least) * stretch) * (latents - centre)
    return stretched + SHARPENING_NOISE * amount * torch.randn(latents.shape, generator=chance)


def _choose(pictures: torch.Tensor, chance: torch.Generator, *, cropped: bool) -> torch.Tensor:
    """A batch of whole pictures (8, 3, 128, 128), or of windows (32, 3, 64, 64): the same work."""
    picks = torch.randint(len(pictures), (BATCH if cropped else BATCH // 4,), generator=chance)
    if not cropped:
        return pictures[picks]
    corners = torch.randint(WIDTH - CROP + 1, (BATCH, 2), generator=chance).tolist()
    windows = [
        pictures[pick, :, y : y + CROP, x : x + CROP]
        for pick, (y, x) in zip(picks.tolist(), corners, strict=True)
    ]
    return torch.stack(windows)


def encode(autoencoder: AutoencoderKL, pictures: torch.Tensor, batch: int = 32) -> torch.Tensor:
    """The unscaled latents (n, 4, 16, 16) of uint8 pictures: each posterior's mean."""
    with torch.inference_mode():
        parts = [autoencoder.encode(to_floats(part)).latent_dist.mean for part in pictures.split(batch)]
        return torch.cat(parts)
