"""Latents to pixels, one picture at a time, with nothing that is not finite passing for black.

diffusers turns NaN into black pictures with a warning at the most. Here the latents and the decoded values
are looked at; what fp16 cannot hold is decoded again in fp32, and what is not finite then is the prompt's
failure.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from text2img.errors import ErrorCode, PromptFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from text2img.engine.families import Family


class Decoder:
    """Decodes for one pipeline; pictures pass its safety checker where it has one."""

    def __init__(self, pipe: Any, family: Family) -> None:
        self._pipe = pipe
        self._family = family
        self._checker = getattr(pipe, "safety_checker", None)

    @property
    def wants(self) -> str:
        """The pipeline's output type that ``pictures`` takes."""
        return "latent" if self._family.names else "pt"

    def pictures(self, output: Any, size: tuple[int, int]) -> list[NDArray[np.uint8] | PromptFailed]:
        """Pixels, uint8 (height, width, 3), or the reason for none, for each of ``output``'s pictures.

        ``output``: latents as the family's pipeline leaves them; (n, 3, height, width) in [0, 1] with other
        pipelines. ``size`` is (width, height) in pixels. Pictures are decoded one by one, so that memory
        does not grow with the batch and none depends on its neighbours.
        """
        import torch

        with torch.no_grad():
            if self.wants == "pt":
                return [self._finished(picture[None] * 2 - 1) for picture in output]
            with self._upcast(self._overflows()):
                return [self._picture(latents[None]) for latents in self._unpacked(output, size)]

    def _picture(self, latents: Any) -> NDArray[np.uint8] | PromptFailed:
        """One picture of latents (1, c, h, w)."""
        if not _finite(latents):
            return PromptFailed(
                ErrorCode.NOT_FINITE,
                "the model's result holds values that are not finite; another dtype (bf16, fp32) may help",
            )
        decoded = self._decode(latents)
        if not _finite(decoded):
            with self._upcast(wanted=True):
                decoded = self._decode(latents)
        return self._finished(decoded)

    def _decode(self, latents: Any) -> Any:
        """(1, 3, 8h, 8w), around [-1, 1], of latents (1, c, h, w); the inverse of the VAE's scaling."""
        import torch

        vae = self._pipe.vae
        config = vae.config
        latents = latents.to(vae.dtype)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None and self._family.name == "sdxl":
            like = {"device": latents.device, "dtype": latents.dtype}
            mean, std = (torch.tensor(values, **like).view(1, -1, 1, 1) for values in (mean, std))
            latents = latents * std / config.scaling_factor + mean
        else:
            shift = config.get("shift_factor") if self._family.flow else None
            latents = latents / config.scaling_factor + (shift or 0)
        return vae.decode(latents, return_dict=False)[0]

    def _finished(self, decoded: Any) -> NDArray[np.uint8] | PromptFailed:
        if not _finite(decoded):
            return PromptFailed(
                ErrorCode.NOT_FINITE,
                "the picture holds values that are not finite, also when decoded in fp32",
            )
        if self._flagged(decoded):
            return PromptFailed(ErrorCode.SAFETY, "the model's safety checker flagged the picture")
        return to_pixels(decoded)

    def _flagged(self, decoded: Any) -> bool:
        """What the model's checker says of (1, 3, height, width)."""
        if self._checker is None:
            return False
        _, flags = self._pipe.run_safety_checker(decoded.clone(), decoded.device, self._checker.dtype)
        return bool(flags and flags[0])

    def _overflows(self) -> bool:
        """Whether the VAE is known to overflow in fp16. SD 1.x's say so too, where only XL's do."""
        import torch

        vae = self._pipe.vae
        forced = self._family.name == "sdxl" and bool(vae.config.get("force_upcast"))
        return forced and vae.dtype == torch.float16

    @contextlib.contextmanager
    def _upcast(self, wanted: bool) -> Iterator[None]:  # noqa: FBT001 - private, and named by its callers
        """The VAE in fp32 within the block. fp16 to fp32 and back loses nothing."""
        import torch

        vae = self._pipe.vae
        dtype = vae.dtype
        if not wanted or dtype == torch.float32:
            yield
            return
        try:
            vae.to(torch.float32)  # may itself run out of memory half-way
            yield
        finally:
            vae.to(dtype)

    def _unpacked(self, latents: Any, size: tuple[int, int]) -> Any:
        """(n, c, h, w), also where the pipeline leaves 2 × 2 latent pixels in one: (n, h/2·w/2, 4c)."""
        if not self._family.packed:
            return latents
        side = 2 * self._pipe.vae_scale_factor
        width, height = size[0] // side, size[1] // side
        squares = latents.unflatten(1, (height, width)).unflatten(-1, (-1, 2, 2))
        return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def to_pixels(decoded: Any) -> NDArray[np.uint8]:
    """uint8 (height, width, 3) of (1, 3, height, width) around [-1, 1]; rounds as diffusers does."""
    unit = (decoded[0] * 0.5 + 0.5).clamp(0, 1)
    values = unit.cpu().permute(1, 2, 0).float().numpy()
    pixels: NDArray[np.uint8] = (values * 255).round().astype("uint8")
    return pixels


def _finite(values: Any) -> bool:
    import torch

    return bool(torch.isfinite(values).all())
