"""Few steps: the demo model's UNet taught to say at once where its guided denoising would end.

Latent consistency distillation (Luo, Tan, Huang, Li, Zhao 2023, arXiv 2310.04378): wherever on a path from
noise to a picture the student is asked, it is to name the same end. The guidance is taught along with it, so
that it is asked once a step, without the empty caption. Knows nothing of pixels.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from diffusers import LCMScheduler
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.diffusion import NOISE
from training.schedule import Course, Learner

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import UNet2DConditionModel

GUIDANCE = 3.0  # of the teacher, which draws best at it
POINTS = 50  # on the teacher's path, which LCMScheduler calls original_inference_steps
STRIDE = 5  # points a step of the teacher goes back, so that what is known near the picture reaches the noise
BATCH = 32
DECAY = 0.95  # of the average that the student is compared with
NEARNESS = 0.03  # well below such a difference the loss is its square, well above it its size


def build_few_step_scheduler() -> LCMScheduler:
    """The scheduler that a model of few steps is run with."""
    return LCMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, original_inference_steps=POINTS)


def distil(
    teacher: UNet2DConditionModel, latents: torch.Tensor, words: torch.Tensor, steps: int, checkpoint: Path
) -> UNet2DConditionModel:
    """A student of ``teacher`` that needs few steps; ``latents`` and ``words`` as in ``train_unet``."""
    torch.manual_seed(5)
    teacher = teacher.eval().requires_grad_(requires_grad=False)
    student = copy.deepcopy(teacher).requires_grad_()
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    learner = Learner(student, Course(steps, peak=5e-4, floor=1e-5), checkpoint, average=average)
    chance, scenes = torch.Generator().manual_seed(learner.step), len(words) - 1
    kept = build_few_step_scheduler().alphas_cumprod

    def loss(
        noisy: torch.Tensor, times: torch.Tensor, earlier: torch.Tensor, guides: torch.Tensor
    ) -> torch.Tensor:
        with torch.no_grad():
            told = _guided(teacher, noisy, times, guides, words[scenes:])
            before = _step_back(noisy, told, kept[times], kept[earlier])
            end = _end(before, average.module(before, earlier, guides).sample, kept[earlier])
            # Where the path is at its end the answer is known; LCMScheduler's c_skip and c_out say the same.
            target = torch.where(_wide(earlier) == 0, before, end)
        answer = _end(noisy, student(noisy, times, guides).sample, kept[times])
        return functional.smooth_l1_loss(answer, target, beta=NEARNESS)

    for _ in learner.steps():
        picks = torch.randint(len(latents), (BATCH,), generator=chance)
        points = torch.randint(1, POINTS + 1, (BATCH,), generator=chance)
        times, earlier = _moment(points), _moment(points - STRIDE)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=chance)
        share = _wide(kept[times])
        noisy = share.sqrt() * latents[picks] + (1 - share).sqrt() * noise
        learner.learn(loss, noisy, times, earlier, words[picks % scenes])
        average.update_parameters(student)
    trained: UNet2DConditionModel = average.module
    return trained.eval()


def _moment(points: torch.Tensor) -> torch.Tensor:
    """The moments, 0 … 999, of points up to POINTS on the path; at 0 and before it is the picture."""
    return (points * (NOISE["num_train_timesteps"] // POINTS) - 1).clamp(min=0)


def _wide(values: torch.Tensor) -> torch.Tensor:
    """(n) → (n, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def _guided(
    teacher: UNet2DConditionModel,
    noisy: torch.Tensor,
    times: torch.Tensor,
    guides: torch.Tensor,
    empty: torch.Tensor,
) -> torch.Tensor:
    """What the teacher tells under guidance; ``empty`` (1, 77, 64) is the caption to point away from."""
    both = torch.cat([empty.expand_as(guides), guides])
    away, towards = teacher(noisy.repeat(2, 1, 1, 1), times.repeat(2), both).sample.chunk(2)
    return away + GUIDANCE * (towards - away)


def _end(noisy: torch.Tensor, velocity: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The clean latents that the velocity points to; ``kept`` (n) is the signal's part of the power."""
    kept = _wide(kept)
    return kept.sqrt() * noisy - (1 - kept).sqrt() * velocity


def _step_back(
    noisy: torch.Tensor, velocity: torch.Tensor, kept: torch.Tensor, then: torch.Tensor
) -> torch.Tensor:
    """One step of DDIM without noise (Song, Meng, Ermon 2020, arXiv 2010.02502, eq. 12) to where ``then`` is
    kept of the signal.
    """
    noise = _wide(kept).sqrt() * velocity + _wide(1 - kept).sqrt() * noisy
    return _wide(then).sqrt() * _end(noisy, velocity, kept) + _wide(1 - then).sqrt() * noise
