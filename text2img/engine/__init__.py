"""Engines: which model runs on which device, and how.

This module imports no torch, so that code which only reads settings can create the options.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from text2img.prompts.parameters import RequestedParameters

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from text2img.errors import PromptFailed
    from text2img.prompts import Request


Device = Literal["auto", "cuda", "mps", "cpu"]
Precision = Literal["auto", "fp16", "bf16", "fp32"]
Compile = Literal["auto", "always", "never"]
Offload = Literal["none", "model", "sequential"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Options of the diffusers engine, chosen before it has seen a model.

    ``model`` is a folder, a hub id or a single file; ``revision`` pins a hub id; ``base`` is the folder or
    hub id that lends a single file what it does not hold. ``variant`` names a set of weight files, such as
    ``fp16``. ``without`` lists components whose weights are not needed. ``dtype`` ``auto`` is fp32 on the
    CPU; on a GPU bf16 for transformers whose weights are bf16, where the device has it, else fp16.
    ``safety_checker`` False leaves the model's own checker unloaded. ``compile`` sets when the denoiser is
    compiled: where it pays, at the first batch of each shape, or never. ``compile_cache`` is the folder that
    keeps compiled code and measurements for later runs. ``feature_cache`` n > 1 computes the deep part of a
    UNet only at every n-th call, an approximation. ``autoencoder`` names one (a folder or hub id) that
    decodes instead of the model's own; a tiny one is an approximation. ``offload`` keeps the weights in the
    host's memory, except for the component (``model``) or the layer (``sequential``) that is running.
    """

    model: str
    revision: str | None = None
    base: str | None = None
    variant: str | None = None
    without: tuple[str, ...] = ()
    device: Device = "auto"
    dtype: Precision = "auto"
    safety_checker: bool = True
    compile: Compile = "auto"
    compile_cache: str | None = None
    feature_cache: int = 0
    autoencoder: str | None = None
    offload: Offload = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Facts about a model that are known without its weights.

    ``width`` and ``height`` are its native size in pixels; ``multiple`` is what a size must be a multiple of.
    ``scheduler`` is the model's own scheduler, ``schedulers`` are the names that a request may select.
    ``max_side`` is the maximum of a side in pixels, None without a limit. ``max_steps`` maps a scheduler to
    its maximum number of steps; for others it is 1000. ``approximations`` maps the name of each active
    approximation to its value, ``parts`` the name of each other part that is not the model's own. ``sources``
    maps each component of a single file to where it is from. ``requested`` holds the parameters that suit the
    model where a request sets none; the run's defaults apply to what it leaves open; ``defaults_from`` says
    whose they are.

    ``guidance``: a guidance scale changes the image; it is at least ``least_guidance``. A negative prompt
    takes effect with a guidance above ``negative_above``; None: never. With ``true_cfg`` it does, too, with a
    ``true_cfg_scale`` above 1, which is a parameter of its own beside the guidance. ``sizes`` are all sizes
    that the model draws, empty where it draws others too; with ``fixed_area`` it draws only sizes of about as
    many pixels as its own.
    """

    name: str
    revision: str | None
    family: str
    width: int
    height: int
    multiple: int
    scheduler: str
    schedulers: tuple[str, ...]
    max_side: int | None = None
    max_steps: Mapping[str, int] = field(default_factory=dict)
    approximations: Mapping[str, object] = field(default_factory=dict)
    parts: Mapping[str, object] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    requested: RequestedParameters = field(default_factory=RequestedParameters)
    defaults_from: str = "the job's"
    guidance: bool = True
    true_cfg: bool = False
    least_guidance: float = 0.0
    negative_above: float | None = -1.0
    sizes: tuple[tuple[int, int], ...] = ()
    fixed_area: bool = False

    def drawn_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the size that the pipeline draws if it is asked for this one."""
        if not self.fixed_area:
            return width, height
        scale = math.sqrt(self.width * self.height / (width * height))
        step = self.multiple
        return int(width * scale // step * step), int(height * scale // step * step)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedImage:
    """A generated image: ``pixels`` is uint8, (height, width, 3), RGB.

    ``truncated``: the model did not read the whole text. A hosted model may choose another height and width
    than requested. ``seed`` is the seed it used, None where it is the requested one. ``provider_metadata``
    has those of PROVIDER_METADATA_FIELDS that the provider returned. ``delivered`` is the provider's file, if
    it has a C2PA manifest.
    """

    pixels: NDArray[np.uint8]
    scheduler: str
    truncated: bool = False
    seed: int | None = None
    provider_metadata: Mapping[str, object] = field(default_factory=dict)
    delivered: bytes | None = None


class Engine(Protocol):
    """One model on one device, used from one thread at a time (``prepare`` from any thread).

    ``seconds`` adds up the time spent by stage: ``load``, ``compile``, ``denoise``, ``decode``.
    """

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds spent so far, by stage."""
        ...

    def inspect(self) -> ModelInfo:
        """Find the model and check all that can be checked without reading its weights' values.

        Raises ModelFailed for a model that is missing, incomplete, mismatched or of a kind that cannot
        run, DeviceFailed for a device that does not exist, ConfigurationError for options that do not fit
        the model.
        """
        ...

    def load(self) -> None:
        """Load the weights onto the device. All other methods may be called afterwards.

        Raises the same errors as ``inspect``.
        """
        ...

    def prepare(self, request: Request) -> Request:
        """Return the request with its chunks counted, and without parameters that would have no effect.

        Raises PromptFailed (``invalid_parameters``) for a request that this model cannot run, or whose prompt
        itself asks for what would have no effect.
        """
        ...

    def warm_up(self, batch: Sequence[Request], remaining: int) -> None:
        """Do what makes batches like this one faster (compile), once and only where it pays.

        ``remaining``: images that the run still has to generate, including this batch. Call it before each
        ``generate``, with the same batch. It usually does nothing, but may take minutes. It changes images
        only by rounding. Raises DeviceFailed when the device itself has failed.
        """
        ...

    def generate(
        self, batch: Sequence[Request], on_step: Callable[[int, int], None]
    ) -> list[GeneratedImage | PromptFailed]:
        """Return an image, or the reason why there is none, for each request of a batch, in its order.

        All requests of the batch have one shape. Each request has its own generator, created from its
        seed. ``on_step(done, total)`` is called after each denoising step; an exception that it raises
        ends the call and leaves the engine usable. Raises DeviceFailed when the device itself has failed.
        """
        ...

    def peak_memory(self) -> int:
        """Return the peak memory in bytes: the device's where it is counted, else the process's."""
        ...

    def close(self) -> None:
        """Free the weights' memory, on the device and on the host. ``load`` may be called again."""
        ...
