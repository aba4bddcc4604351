"""The UNet: from noise to latents, guided by words. Knows the autoencoder only by its latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.schedule import Course, Learner

if TYPE_CHECKING:
    from pathlib import Path

CHANNELS = (32, 64, 96)
BATCH = 64
EMPTY_PART = 0.1  # of the captions are dropped, so that guidance has something to point away from
EMA_DECAY = 0.999
SNR_CAP = 5.0  # the nearly clean steps are hard to get exactly right and decide nothing a person sees

# The end of the usual schedule (0.012) leaves 7 % of the picture at the noisiest step: enough for the
# initial noise to whisper a background colour against the words. This end leaves 1.5 %. For so little signal
# the velocity is the steadier thing to predict.
NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
}


def build_unet() -> UNet2DConditionModel:
    """An untrained UNet of 2.7 million parameters; it reads the words at 8 × 8 and 4 × 4 only."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
        cross_attention_dim=64,
        attention_head_dim=4,
    )


# Whoever builds another scheduler from this one's configuration takes these along, as with the real models:
# without them DDIM would clip the latents, which reach further than ±1, and PNDM begin with Runge–Kutta.
OTHER_SCHEDULERS = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}


def build_scheduler() -> DPMSolverMultistepScheduler:
    """The model's own scheduler.

    Of the first order: ten steps at guidance 7.5 then draw 99 % of the colours right, not 77 %.
    """
    own = NOISE | {"timestep_spacing": "trailing", "steps_offset": 1, "solver_order": 1}
    return DPMSolverMultistepScheduler.from_config(own | OTHER_SCHEDULERS)


def train_unet(
    latents: torch.Tensor, words: torch.Tensor, steps: int, checkpoint: Path
) -> UNet2DConditionModel:
    """A UNet trained on scaled latents (n × 448, 4, 16, 16), in the order of `all_scenes`.

    `words`: what the text encoder makes of the 448 captions and, last, of the empty one: (449, 77, 64).
    """
    torch.manual_seed(3)
    unet = build_unet()
    average = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    learner = Learner(unet, Course(steps), checkpoint, average=average)
    noising, chance = DDPMScheduler(**NOISE), torch.Generator().manual_seed(learner.step)
    scenes = len(words) - 1

    def loss(
        latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, guides: torch.Tensor
    ) -> torch.Tensor:
        told = unet(noising.add_noise(latents, noise, times), times, guides).sample
        squared = functional.mse_loss(told, noising.get_velocity(latents, noise, times), reduction="none")
        kept = noising.alphas_cumprod[times]
        ratio = kept / (1 - kept)
        return (squared.mean(dim=(1, 2, 3)) * ratio.clamp(max=SNR_CAP) / (ratio + 1)).mean()

    for _ in learner.steps():
        picks = torch.randint(len(latents), (BATCH,), generator=chance)
        dropped = torch.rand(BATCH, generator=chance) < EMPTY_PART
        guides = words[torch.where(dropped, scenes, picks % scenes)]
        noise = torch.randn(BATCH, *latents.shape[1:], generator=chance)
        times = torch.randint(noising.config.num_train_timesteps, (BATCH,), generator=chance)
        learner.learn(loss, latents[picks], noise, times, guides)
        average.update_parameters(unet)
    trained: UNet2DConditionModel = average.module
    return trained.eval()
