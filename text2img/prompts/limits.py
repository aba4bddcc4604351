"""Limits that the operator sets on what one prompt may request, and the check of a prompt against them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts.parameters import RequestedParameters

if TYPE_CHECKING:
    from text2img.prompts.parameters import Parameters

SMALLEST_SIZE: Final = RequestedParameters(width=128, height=128)
"""Placeholder for the model's own size where only what is certain to exceed a limit may be refused.

It is at most the size of every model, and large enough for every aspect ratio.
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """The maximum pixels of an image, steps of an image, images of a prompt, and work of a prompt.

    The work is images × steps × megapixels; a megapixel is 1,000,000 pixels. A refinement loop's candidates
    and iterations are the operator's own choice and do not count as images.
    """

    max_pixels: int = 4096**2
    max_steps: int = 1000
    max_images: int = 100
    max_work: float = 25_000

    def check(self, parameters: Parameters) -> None:
        """Raise PromptFailed (``invalid_parameters``) for the first limit that the parameters exceed."""
        width, height, steps = parameters.width, parameters.height, parameters.num_inference_steps
        images, pixels = parameters.num_images, width * height
        if pixels > self.max_pixels:
            raise _too_much(f"width × height is {width}×{height}, {pixels:,} pixels", self, "max_pixels")
        if steps > self.max_steps:
            raise _too_much(f"num_inference_steps is {steps:,}", self, "max_steps")
        if images > self.max_images:
            raise _too_much(f"num_images is {images:,}", self, "max_images")
        if images * steps * pixels > self.max_work * 1e6:
            parts = f"num_images {images:,} × num_inference_steps {steps:,} × {pixels / 1e6:.2f} megapixels"
            raise _too_much(f"{parts} is {images * steps * pixels / 1e6:,.1f}", self, "max_work")


def _too_much(request: str, limits: Limits, name: str) -> PromptFailed:
    flag = name.replace("_", "-")
    maximum = f"{getattr(limits, name):,}".removesuffix(".0")
    message = f"{request}; this job allows at most {maximum} (--{flag})"
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, message)
