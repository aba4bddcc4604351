"""Latents to pixels, rounded on the device, with nothing that is not finite passing for black.

diffusers turns NaN into black pictures with a warning at the most. Here the latents and the decoded values
are looked at; what fp16 cannot hold is decoded again in fp32, and what is not finite then is the prompt's
failure.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any, Final

from text2img.engine.hub import find_autoencoder
from text2img.engine.model_folder import Component, ModelFolder, read_json
from text2img.errors import ConfigurationError, ErrorCode, PromptFailed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from text2img.engine.model_folder import Family


if TYPE_CHECKING:
    Finished = tuple[Any, Any]
    """uint8 (height, width, 3) and a bool of no dimensions: whether the values were finite."""


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
        pipelines. ``size`` is (width, height) in pixels.
        """
        import torch

        with torch.no_grad():
            if self.wants == "pt":
                drawn = [_finished(image * 2 - 1) for image in output]
                return self._fetched(drawn, torch.ones(len(output), dtype=torch.bool, device=output.device))
            latents = self._unpacked(output, size)
            sound = torch.isfinite(latents).flatten(1).all(dim=1)
            with self._upcast(self._overflows()):
                drawn = self._drawn(latents)
                return self._fetched(drawn, sound, again=latents)

    def _drawn(self, latents: Any) -> list[Finished]:
        """Each picture of latents (n, c, h, w), on the device; nothing here waits for it.

        They are decoded one by one: memory does not grow with the batch, and no picture depends on its
        neighbours or their number. One is work enough for a call: at 512², the VAE of Stable Diffusion 1
        takes as much arithmetic for a picture as three forward passes of its UNet.
        """
        return [_finished(self._decode(one[None])[0]) for one in latents]

    def _fetched(
        self, drawn: list[Finished], sound: Any, again: Any = None
    ) -> list[NDArray[np.uint8] | PromptFailed]:
        """The pictures in the host's memory: one wait for the flags, then one copy of all pixels.

        ``sound`` (n): whose latents are finite. ``again``: latents to decode once more, in fp32, where the
        picture is not finite though its latents are.
        """
        import torch

        flags = torch.stack([sound, torch.stack([whole for _, whole in drawn])]).cpu()
        overflowed = (flags[0] & ~flags[1]).nonzero().flatten().tolist()
        if again is not None and overflowed and self._pipe.vae.dtype != torch.float32:
            with self._upcast(wanted=True):
                mended = self._drawn(again[overflowed])
            for index, image in zip(overflowed, mended, strict=True):
                drawn[index] = image
                flags[1, index] = image[1].cpu()
        pixels = torch.stack([image for image, _ in drawn]).cpu().numpy()
        return [
            self._result(one, sound=sound, whole=whole)
            for one, sound, whole in zip(pixels, *flags.tolist(), strict=True)
        ]

    def _result(
        self, pixels: NDArray[np.uint8], *, sound: bool, whole: bool
    ) -> NDArray[np.uint8] | PromptFailed:
        if not sound:
            return PromptFailed(
                ErrorCode.NOT_FINITE,
                "the model's result holds values that are not finite; another dtype (bf16, fp32) may help",
            )
        if not whole:
            return PromptFailed(
                ErrorCode.NOT_FINITE,
                "the picture holds values that are not finite, also when decoded in fp32",
            )
        if self._flagged(pixels):
            return PromptFailed(ErrorCode.SAFETY, "the model's safety checker flagged the picture")
        return pixels

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

    def _flagged(self, pixels: NDArray[np.uint8]) -> bool:
        """What the model's checker says of a picture, which diffusers too shows it rounded to 8 bits."""
        if self._checker is None:
            return False
        unit = pixels[None].astype("float32") / 255
        _, flags = self._pipe.run_safety_checker(unit, self._checker.device, self._checker.dtype)
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


def to_pixels(decoded: Any) -> Any:
    """A uint8 tensor (height, width, 3) of one (3, height, width) around [-1, 1], on its device.

    Rounds as diffusers does on the host: in the tensor's own dtype to [0, 1], in fp32 to whole levels.
    """
    import torch

    unit = (decoded * 0.5 + 0.5).clamp(0, 1)
    return (unit.permute(1, 2, 0).float() * 255).round().to(torch.uint8)


def _finished(decoded: Any) -> Finished:
    """Of (3, height, width) the pixels, and whether all values were finite; both still on the device."""
    import torch

    return to_pixels(decoded), torch.isfinite(decoded).all()


_CLASS: Final = "AutoencoderTiny"
_LEVELS: Final = (64, 64, 64, 64)
"""Channels of the decoder's levels where a configuration is silent; between them a picture doubles."""


def replace_autoencoder(model: ModelFolder, name: str) -> tuple[ModelFolder, str]:
    """The model with the autoencoder ``name`` (a folder, ``owner/name`` or ``owner/name@revision``) as its
    ``vae``, and what to record: the name, with its commit where it is the hub's.

    Raises ConfigurationError for one of another class or one that does not fit the model, ModelFailed where
    there is none.
    """
    path, commit = find_autoencoder(name)
    config = read_json(path / "config.json")
    _check(model, config, name)
    levels = list(config.get("decoder_block_out_channels") or _LEVELS)
    config = {**config, "block_out_channels": levels}
    tiny = Component(name="vae", library="diffusers", class_name=_CLASS, folder=path, config=config)
    recorded = name if commit is None else f"{name.partition('@')[0]}@{commit}"
    return dataclasses.replace(model, components={**model.components, "vae": tiny}), recorded


def _check(model: ModelFolder, config: Mapping[str, Any], name: str) -> None:
    kind = config.get("_class_name")
    if kind != _CLASS:
        raise ConfigurationError(f"autoencoder {name} holds {kind}; it must be an {_CLASS}, such as TAESD")
    if not model.family.names:
        raise ConfigurationError(
            f"an autoencoder of its own is for Stable Diffusion and Flux; this model is a {model.pipeline}"
        )
    own = model.components["vae"].config
    levels = config.get("decoder_block_out_channels") or _LEVELS
    scale = config.get("upsampling_scaling_factor", 2) ** (len(levels) - 1)
    pairs = {
        "latent channels": (config.get("latent_channels", 4), own.get("latent_channels", 4)),
        "pixels a latent": (scale, 2 ** (len(own.get("block_out_channels") or _LEVELS) - 1)),
        "colours": (config.get("out_channels", 3), own.get("out_channels", 3)),
    }
    for what, (its, needed) in pairs.items():
        if its != needed:
            raise ConfigurationError(
                f"autoencoder {name} does not fit the model: {what} are {its} and the model's {needed}"
            )
