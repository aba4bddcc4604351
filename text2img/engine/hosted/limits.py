"""What fal's models draw well with, and how many steps they take, by their documented input. Asks nobody.

A model that is not listed gets the run's own defaults; what it does not take, fal refuses prompt by prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from text2img.prompts.parameters import Wishes


@dataclass(frozen=True, slots=True)
class Limits:
    """``wishes``: what a model uses by itself. ``longest``: the most steps."""

    wishes: Wishes
    longest: int = 1000


_SCHNELL: Final = Limits(Wishes(num_inference_steps=4, guidance_scale=3.5), longest=12)
_DEV: Final = Limits(Wishes(num_inference_steps=28, guidance_scale=3.5), longest=50)
_KNOWN: Final = {
    "fal-ai/flux/schnell": _SCHNELL,
    "fal-ai/flux-1/schnell": _SCHNELL,
    "fal-ai/flux/dev": _DEV,
    "fal-ai/flux-1/dev": _DEV,
}


def limits(model: str) -> Limits:
    """Those of a model by its name."""
    return _KNOWN.get(model, Limits(Wishes()))
