"""Which model runs on which device, and how. Imports no torch: whoever reads settings can build it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
