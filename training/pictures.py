"""The pictures to learn from: freshly drawn scenes as tensors. Knows nothing of any network."""

from __future__ import annotations

from random import Random

import numpy as np
import torch

from text2img.demo.scenes import all_scenes, draw

WIDTH = 128  # pixels, and as many high


def draw_pictures(each: int, seed: int) -> torch.Tensor:
    """Every scene `each` times, in the order of `all_scenes`: (each × 448, 3, 128, 128), uint8."""
    chance = Random(seed)
    pictures = [np.asarray(draw(scene, chance, WIDTH)) for _ in range(each) for scene in all_scenes()]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def to_floats(pictures: torch.Tensor) -> torch.Tensor:
    """From uint8 in 0…255 to float32 in −1…1, the range in which diffusion models see pictures."""
    return pictures.float() / 127.5 - 1
