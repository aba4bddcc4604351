"""The denoising call of a pipeline, and the decoding.

A part is what runs at once of a batch: requests of one shape go in, latents (or images) come out. Pixels are
rounded on the device. diffusers turns NaN into black images, with a warning at most; here the latents and the
decoded values are checked. Values that overflow fp16 are decoded again in fp32; if they are still not finite,
the prompt fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
from typing import TYPE_CHECKING, Any, Final

from text2img.engine.devices import FailureKind, classify_error, free_caches, one_line, out_of_memory
from text2img.engine.loading import find_autoencoder
from text2img.engine.model_folder import Component, ModelFolder, read_json
from text2img.engine.pipelines import DecodedImages, call_of
from text2img.engine.steps import StepSource
from text2img.engine.text_encoding import ChunkedText, PipelineText, WholeText
from text2img.errors import ConfigurationError, ErrorCode, PromptFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

    from text2img.engine.model_folder import Family
    from text2img.engine.steps import StepCounter
    from text2img.prompts import Request


if TYPE_CHECKING:
    Decoded = tuple[Any, Any]
    """Pixels, uint8 (height, width, 3), and a bool of no dimensions: True if the values were finite."""


class Decoder:
    """Decodes for one pipeline and applies its safety checker where it has one.

    What does not fit into memory is decoded again, in smaller parts and then in tiles: the latents are there.
    """

    def __init__(self, pipe: Any, family: Family) -> None:
        self._pipe = pipe
        self._family = family
        self._checker = getattr(pipe, "safety_checker", None)
        self._one_by_one: set[tuple[int, int]] = set()
        """Sizes of images that are decoded one by one, as several at once did not fit."""

    @property
    def output_type(self) -> str:
        """The pipeline's output type that ``decode`` takes."""
        return "latent" if self._family.names else "np"

    def decode(self, output: Any, size: tuple[int, int]) -> list[NDArray[np.uint8] | PromptFailed]:
        """Return pixels, uint8 (height, width, 3), or the failure, for each image of ``output``.

        ``output``: latents as the family's pipeline returns them; DecodedImages with other pipelines.
        ``size`` is (width, height) in pixels.
        """
        import torch

        if isinstance(output, DecodedImages):
            return output.pixels(size)
        with torch.no_grad():
            latents = self._unpack(output, size)
            results = None if size in self._one_by_one else self._attempt(latents)
            if results is None:
                self._one_by_one.add(size)
                return [self._decode_alone(image[None], size) for image in latents]
            return results

    def _decode_alone(self, latents: Any, size: tuple[int, int]) -> NDArray[np.uint8] | PromptFailed:
        """Return the pixels of one image's latents, decoded whole or, if that does not fit, in tiles.

        Tiles overlap and are blended; the image differs a little from one that was decoded whole.
        """
        tiles = self._tile_sizes(latents)
        for tile in tiles:
            results = self._attempt(latents, tile, last=tile == tiles[-1])
            if results is not None:
                if tile:
                    logger.info("decoded an image of %d×%d in tiles, for lack of memory", *size)
                return results[0]
        return out_of_memory(*size)

    def _attempt(
        self, latents: Any, tile: int = 0, *, last: bool = False
    ) -> list[NDArray[np.uint8] | PromptFailed] | None:
        """Decode latents on the device and copy the pixels; return None if that does not fit into memory.

        The exception itself is dropped: its traceback holds the tensors of all its frames. ``last``: raise an
        error that only may be the memory's, since nothing smaller is left to try.
        """
        import torch

        latents_finite = torch.isfinite(latents).flatten(1).all(dim=1)
        try:
            with self._tiles(tile), self._upcast(self._vae_overflows()):
                decoded = self._decode_each(latents)
                return self._to_host(decoded, latents_finite, latents=latents)
        except Exception as exc:
            kind = classify_error(exc)
            if kind is not FailureKind.MEMORY and (last or kind is not FailureKind.UNCLEAR):
                raise
            logger.debug("decoding %d images failed: %s", len(latents), one_line(exc), exc_info=True)
        free_caches()
        return None

    def _tile_sizes(self, latents: Any) -> list[int]:
        """Return the sides of tiles to try, in latent pixels, the largest first; 0 is the whole image.

        A tile's overlap is a quarter of it, or an eighth with a tiny autoencoder, in whole latent pixels.
        """
        vae = self._pipe.vae
        if not hasattr(vae, "tile_latent_min_size"):
            return [0]
        unit = round(1 / vae.tile_overlap_factor)
        longer = max(latents.shape[2:])
        sides = {-(-longer // (share * unit)) * unit for share in (2, 4)}
        return [0, *sorted((side for side in sides if side < longer), reverse=True)]

    @contextlib.contextmanager
    def _tiles(self, tile: int) -> Iterator[None]:
        """Make the VAE decode in tiles of this side within the context; 0: whole images."""
        vae = self._pipe.vae
        if not tile:
            yield
            return
        wanted = {
            "use_tiling": True,
            "tile_latent_min_size": tile,
            "tile_sample_min_size": tile * self._pipe.vae_scale_factor,
        }
        before = {name: getattr(vae, name) for name in wanted}
        try:
            for name, value in wanted.items():
                setattr(vae, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(vae, name, value)

    def _decode_each(self, latents: Any) -> list[Decoded]:
        """Decode latents (n, c, h, w) on the device, image by image, without waiting for it.

        Memory then does not grow with the batch, and no image depends on its neighbours or their number.
        One image is enough work for a call. At 512², decoding one with the VAE of Stable Diffusion 1 takes
        as much arithmetic as three forward passes of its UNet.
        """
        return [_with_finite_flag(self._decode_latents(image[None])[0]) for image in latents]

    def _to_host(
        self, decoded: list[Decoded], latents_finite: Any, latents: Any = None
    ) -> list[NDArray[np.uint8] | PromptFailed]:
        """Copy the images to the host's memory: one wait for the flags, then one copy of all pixels.

        ``latents_finite`` (n) flags the images whose latents are finite. ``latents`` are decoded again, in
        fp32, where an image is not finite though its latents are; None where there are no latents.
        """
        import torch

        pixels_finite = torch.stack([finite for _, finite in decoded])
        flags = torch.stack([latents_finite, pixels_finite]).cpu()
        overflowed = (flags[0] & ~flags[1]).nonzero().flatten().tolist()
        if latents is not None and overflowed and self._pipe.vae.dtype != torch.float32:
            with self._upcast(enabled=True):
                redecoded = self._decode_each(latents[overflowed])
            for index, image in zip(overflowed, redecoded, strict=True):
                decoded[index] = image
                flags[1, index] = image[1].cpu()
        pixels = torch.stack([image for image, _ in decoded]).cpu().numpy()
        return [
            self._result(image, latents_finite=in_latents, pixels_finite=in_pixels)
            for image, in_latents, in_pixels in zip(pixels, *flags.tolist(), strict=True)
        ]

    def _result(
        self, pixels: NDArray[np.uint8], *, latents_finite: bool, pixels_finite: bool
    ) -> NDArray[np.uint8] | PromptFailed:
        if not latents_finite:
            return PromptFailed(
                ErrorCode.NOT_FINITE,
                "the model's latents are not finite; another dtype (bf16, fp32) may help",
            )
        if not pixels_finite:
            return PromptFailed(
                ErrorCode.NOT_FINITE,
                "the image is not finite, even when decoded in fp32",
            )
        if self._is_flagged(pixels):
            return PromptFailed(ErrorCode.SAFETY, "the model's safety checker flagged the image")
        return pixels

    def _decode_latents(self, latents: Any) -> Any:
        """Decode latents (1, c, h, w) to (1, 3, 8h, 8w), around [-1, 1]; undoes the VAE's scaling first."""
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

    def _is_flagged(self, pixels: NDArray[np.uint8]) -> bool:
        """Return True if the model's safety checker flags the image, rounded to 8 bits as in diffusers."""
        if self._checker is None:
            return False
        unit = pixels[None].astype("float32") / 255
        _, flags = self._pipe.run_safety_checker(unit, self._checker.device, self._checker.dtype)
        return bool(flags and flags[0])

    def _vae_overflows(self) -> bool:
        """Return True if the VAE is known to overflow in fp16.

        The configurations of SD 1.x declare it too, but only XL's VAEs overflow.
        """
        import torch

        vae = self._pipe.vae
        forced = self._family.name == "sdxl" and bool(vae.config.get("force_upcast"))
        return forced and vae.dtype == torch.float16

    @contextlib.contextmanager
    def _upcast(self, enabled: bool) -> Iterator[None]:  # noqa: FBT001 - private, and named by its callers
        """Keep the VAE in fp32 within the context. fp16 to fp32 and back loses nothing."""
        import torch

        vae = self._pipe.vae
        dtype = vae.dtype
        if not enabled or dtype == torch.float32:
            yield
            return
        try:
            vae.to(torch.float32)  # may itself run out of memory half-way
            yield
        finally:
            vae.to(dtype)

    def _unpack(self, latents: Any, size: tuple[int, int]) -> Any:
        """Return latents as (n, c, h, w).

        Some pipelines pack 2 × 2 latent pixels into one: (n, h/2·w/2, 4c).
        """
        if not self._family.packed:
            return latents
        side = 2 * self._pipe.vae_scale_factor
        width, height = size[0] // side, size[1] // side
        squares = latents.unflatten(1, (height, width)).unflatten(-1, (-1, 2, 2))
        return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def to_pixels(decoded: Any) -> Any:
    """Return a uint8 tensor (height, width, 3) for a (3, height, width) one around [-1, 1], on its device.

    Rounds as diffusers does on the host: in the tensor's own dtype to [0, 1], in fp32 to whole levels.
    """
    import torch

    unit = (decoded * 0.5 + 0.5).clamp(0, 1)
    return (unit.permute(1, 2, 0).float() * 255).round().to(torch.uint8)


def _with_finite_flag(decoded: Any) -> Decoded:
    """Return the pixels of (3, height, width), and whether all values are finite; both on the device."""
    import torch

    return to_pixels(decoded), torch.isfinite(decoded).all()


TINY_AUTOENCODER: Final = "AutoencoderTiny"
_FULL_AUTOENCODER: Final = "AutoencoderKL"
_SAME_SPACE: Final = {
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
"""What makes the latents of two AutoencoderKL the same space, with the class's defaults."""
_DEFAULT_CHANNELS: Final = (64, 64, 64, 64)
"""Channels of the decoder's levels where a configuration names none; each next level doubles the size."""


def replace_autoencoder(model: ModelFolder, name: str) -> tuple[ModelFolder, str]:
    """Return the model with the autoencoder ``name`` as its ``vae``, and the name to record.

    It is a tiny one, or a full one of the same latent space. ``name`` is a folder, ``owner/name`` or
    ``owner/name@revision``. The recorded name has the commit if the
    autoencoder comes from the hub. Raises ConfigurationError for one of another class or one that does not
    fit the model, ModelFailed where it does not exist.
    """
    path, commit = find_autoencoder(name)
    config = read_json(path / "config.json")
    class_name = str(config.get("_class_name"))
    tiny = class_name == TINY_AUTOENCODER
    _check_autoencoder(model, config, name)
    if tiny:
        levels = list(config.get("decoder_block_out_channels") or _DEFAULT_CHANNELS)
        config = {**config, "block_out_channels": levels}
    vae = Component(name="vae", library="diffusers", class_name=class_name, folder=path, config=config)
    recorded = name if commit is None else f"{name.partition('@')[0]}@{commit}"
    return dataclasses.replace(model, components={**model.components, "vae": vae}), recorded


def _check_autoencoder(model: ModelFolder, config: Mapping[str, Any], name: str) -> None:
    class_name = config.get("_class_name")
    if class_name not in {TINY_AUTOENCODER, _FULL_AUTOENCODER}:
        raise ConfigurationError(
            f"autoencoder {name} holds {class_name}; it must be an {TINY_AUTOENCODER}, such as TAESD, or an"
            f" {_FULL_AUTOENCODER}"
        )
    if not model.family.names:
        raise ConfigurationError(
            f"--autoencoder works with Stable Diffusion and Flux only; this model is a {model.pipeline}"
        )
    vae = model.components["vae"]
    own, tiny = vae.config, class_name == TINY_AUTOENCODER
    key = "decoder_block_out_channels" if tiny else "block_out_channels"
    levels = config.get(key) or _DEFAULT_CHANNELS
    scale = (config.get("upsampling_scaling_factor", 2) if tiny else 2) ** (len(levels) - 1)
    pairs = {
        "latent channels": (config.get("latent_channels", 4), own.get("latent_channels", 4)),
        "pixels a latent": (scale, 2 ** (len(own.get("block_out_channels") or _DEFAULT_CHANNELS) - 1)),
        "colours": (config.get("out_channels", 3), own.get("out_channels", 3)),
    }
    if not tiny and vae.class_name == _FULL_AUTOENCODER:
        pairs |= {each: (config.get(each, no), own.get(each, no)) for each, no in _SAME_SPACE.items()}
    for quantity, (actual, required) in pairs.items():
        if actual != required:
            raise ConfigurationError(
                f"autoencoder {name} does not fit the model: {quantity} are {actual}"
                f" and the model's {required}"
            )


if TYPE_CHECKING:
    RunContext = Callable[[], AbstractContextManager[None]]

logger = logging.getLogger(__name__)

_CHUNKED_FAMILIES: Final = ("sd", "sdxl")
_SCHNELL_TOKENS: Final = 256
"""Tokens that FLUX.1-schnell was trained to read; diffusers' default, 512, is FLUX.1-dev's."""


class Denoiser:
    """Calls one pipeline, each time within a ``run_context``; ``output`` is the requested output type.

    ``text_lora_key`` returns what the embeddings of a text depend on besides the text: the active LoRAs of
    the text encoders.
    """

    def __init__(
        self,
        pipe: Any,
        family: Family,
        output: str,
        run_context: RunContext,
        text_lora_key: Callable[[], Hashable] = tuple,
    ) -> None:
        self._pipe = pipe
        self._family = family
        self._output = output
        self._run_context = run_context
        self._call = call_of(type(pipe).__name__)
        self._parameters = inspect.signature(pipe.__call__).parameters
        self.source = StepSource(pipe, family, self._parameters)
        self._max_sequence_length = self._find_max_sequence_length()
        self._chunked_text = ChunkedText(pipe, text_lora_key) if family.name in _CHUNKED_FAMILIES else None
        self._whole_text = WholeText(pipe, self._max_sequence_length or 512)
        self._text_encoder = self._chunked_text or self._open_pipeline_text(text_lora_key)

    def chunks(self, request: Request) -> int:
        """Return the number of text-encoder windows that the longer of prompt and negative prompt fills.

        Returns 1 where the pipeline truncates long texts.
        """
        if self._chunked_text is None:
            return 1
        return self._chunked_text.count(request.text, request.parameters.negative_prompt)

    def truncated(self, request: Request) -> bool:
        """Return True if the model reads only the beginning of the text."""
        return self._chunked_text is None and self._whole_text.truncated(request.text)

    def denoise(self, part: Sequence[Request], scheduler: Any, steps: StepCounter, rows: int) -> Any:
        """Return the pipeline's output for the part, run in ``rows`` rows.

        Every request has its own noise, generated on the CPU from its seed. The noise is thus the same in
        another batch, in another attempt, and on another device. Where there are more rows than requests, the
        last request is repeated and the surplus output is dropped.
        """
        requests, part = len(part), [*part, *[part[-1]] * (rows - len(part))]
        self._pipe.scheduler = scheduler
        if self._output == "latent":
            return self._run(part, requests, steps).images[:requests]
        return self._run_groups(part[:requests], steps)

    def _run_groups(self, part: Sequence[Request], steps: StepCounter) -> DecodedImages:
        """Return the images of the part, run in as many calls as the pipeline needs for it."""
        results: dict[int, tuple[NDArray[Any], bool]] = {}
        finished = steps.finished
        for group in self._call.groups(part):
            output = self._run([part[index] for index in group], len(group), steps)
            images = DecodedImages.of(output, len(group))
            results |= zip(group, zip(*images, strict=True), strict=True)
            steps.finished += len(group)
        steps.finished = finished  # the caller counts the whole part
        return DecodedImages(*zip(*(results[index] for index in range(len(part))), strict=True))

    def _run(self, part: Sequence[Request], requests: int, steps: StepCounter) -> Any:
        """Call the pipeline for the part, of which the first ``requests`` count, and return its output."""
        arguments = self._text_arguments(part) | self._call.passed(part, self._output)
        if self.source.calls_back:
            arguments["callback_on_step_end"] = self._step_callback(requests, steps)
        with self._run_context(), self.source.count(requests, arguments["num_inference_steps"], steps):
            return self._pipe(**arguments)

    def _text_arguments(self, part: Sequence[Request]) -> dict[str, Any]:
        if self._text_encoder is not None:
            texts = [request.text for request in part]
            negatives = [request.parameters.negative_prompt for request in part]
            guided = self._call.is_guided(part[0].parameters)
            return self._text_encoder.encode(texts, negatives if guided else None, part[0].chunks)
        arguments = self._call.texts(part)
        if self._max_sequence_length is not None:
            arguments["max_sequence_length"] = self._max_sequence_length
        return arguments

    def _step_callback(self, requests: int, steps: StepCounter) -> Any:
        def step_ended(pipe: Any, index: int, _: Any, __: dict[str, Any]) -> dict[str, Any]:
            steps.step(index + 1, int(getattr(pipe, "num_timesteps", None) or index + 1), requests)
            return {}

        return step_ended

    def _open_pipeline_text(self, text_lora_key: Callable[[], Hashable]) -> PipelineText | None:
        """Return an encoder that uses the pipeline's own ``encode_prompt``, None if its output is unknown."""
        if self._family.name not in PipelineText.POOLED_INDEX or self._max_sequence_length is None:
            return None
        return PipelineText(self._pipe, self._family, self._max_sequence_length, text_lora_key)

    def _find_max_sequence_length(self) -> int | None:
        """Return the number of tokens that the pipeline reads of a prompt; None if it has no such option."""
        parameter = self._parameters.get("max_sequence_length")
        if parameter is None or not isinstance(parameter.default, int):
            return None
        if self._family.name == "flux" and not self._pipe.transformer.config.guidance_embeds:
            return _SCHNELL_TOKENS
        return parameter.default
