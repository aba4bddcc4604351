"""Which model runs on which device, and how. Imports no torch: whoever reads settings can build it."""

from __future__ import annotations

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
    """What the diffusers engine needs to know before it looks at a model.

    ``model`` is a folder or a hub id; ``revision`` pins a hub id; ``variant`` names a set of weight files,
    such as ``fp16``. ``dtype`` ``auto`` is fp16 on a GPU and fp32 on the CPU. ``safety_checker`` False
    leaves the model's own checker unloaded. ``compile`` says when the denoiser is compiled: where it pays,
    at the first batch of each shape, or not at all; ``compile_cache`` is the folder that keeps what was
    compiled and measured for later runs. ``feature_cache`` n > 1 computes the deep part of a UNet at every
    n-th call only; ``autoencoder`` names a tiny autoencoder (a folder or hub id) that decodes in place of the
    model's own: both are approximations. ``offload`` keeps the weights in the host's memory but for the part
    (``model``) or the layer (``sequential``) that is running.
    """

    model: str
    revision: str | None = None
    variant: str | None = None
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
    """What is known of a model without its weights.

    ``width`` and ``height`` (pixels) are its own size, ``multiple`` what a size must be a multiple of,
    ``scheduler`` its own scheduler's name, ``schedulers`` the names a request may ask for. ``largest`` is the
    most pixels a side can have, where that has an end; ``longest`` the most steps by scheduler, else 1000.
    ``approximations`` says, by name, in what its pictures differ from those that it would draw by itself.
    ``wishes`` is what it draws well with, where nobody asks for anything; what it leaves open, the run's
    defaults say.
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
    requested: RequestedParameters = field(default_factory=RequestedParameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """``pixels``: uint8, (height, width, 3), RGB. ``truncated``: the model did not read the whole text.

    Who draws elsewhere may choose: the height and width may be others than was asked for, and ``seed`` is the
    one that was used, where it was another. ``notes``: those of the domain's NOTES that it was told.
    """

    pixels: NDArray[np.uint8]
    scheduler: str
    truncated: bool = False
    seed: int | None = None
    notes: Mapping[str, object] = field(default_factory=dict)


class Engine(Protocol):
    """One model on one device, used from one thread at a time (``prepare`` from any).

    ``seconds`` adds up the time spent by stage: ``load``, ``compile``, ``denoise``, ``decode``.
    """

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds spent so far, by stage."""
        ...

    def inspect(self) -> ModelInfo:
        """Find the model and check all that can be known without its weights' values.

        Raises ModelFailed for a model that is missing, incomplete, mismatched or of a kind that cannot
        run, DeviceFailed for a device that is not there, ConfigurationError for options that do not fit it.
        """
        ...

    def load(self) -> None:
        """Put the weights on the device; raises as ``inspect`` does. Afterwards all else may be called."""
        ...

    def prepare(self, request: Request) -> Request:
        """The request with its chunks counted.

        Raises PromptFailed (``invalid_parameters``) for what this model cannot draw.
        """
        ...

    def warm_up(self, batch: Sequence[Request], left: int) -> None:
        """Do what makes batches like this one faster (compile), once and only where it pays.

        ``left``: pictures the run still has to make, this batch's counted in. Called before each ``generate``
        with what is generated next; mostly does nothing, and may take minutes. Changes no picture by more
        than rounding. Raises DeviceFailed when the device itself has failed.
        """
        ...

    def generate(
        self, batch: Sequence[Request], on_step: Callable[[int, int], None]
    ) -> list[Picture | PromptFailed]:
        """A picture or the reason for none, for each request of a batch of one shape, in its order.

        Each request has its own generator, made anew from its seed. ``on_step(done, of)`` is called after
        each denoising step; what it raises ends the call and leaves the engine usable. Raises DeviceFailed
        when the device itself has failed.
        """
        ...

    def peak_memory(self) -> int:
        """The most bytes held so far: the device's where it counts them, else the process's."""
        ...

    def close(self) -> None:
        """Give the weights' memory back, the device's and the host's. ``load`` may be called again."""
        ...
