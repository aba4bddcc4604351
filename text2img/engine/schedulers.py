"""Schedulers: the names that requests use, which of them fit a model, and how they are made from its own.

A scheduler fits if the settings that the model was trained with reach it.
Importing this module needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from text2img.errors import ModelUnusable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


SHORT_NAMES: Final = {
    "DPMSolverMultistepScheduler": "dpm++",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "DDIMScheduler": "ddim",
    "UniPCMultistepScheduler": "unipc",
    "PNDMScheduler": "pndm",
    "HeunDiscreteScheduler": "heun",
    "LCMScheduler": "lcm",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "EDMDPMSolverMultistepScheduler": "dpm++",
    "EDMEulerScheduler": "euler",
}
"""Scheduler classes and the names that requests use for them. Each name has one class for diffusion models,
and may have one for flow-matching models and one for models of EDM's formulation."""

_KINDS: Final = ("FlowMatch", "EDM")
"""Prefixes of the classes for models that no scheduler of another kind can draw with."""
DIFFUSION: Final = frozenset(name for name in SHORT_NAMES if not name.startswith("FlowMatch")) | {
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "TCDScheduler",
}
FLOW: Final = frozenset(
    {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"}
)
_WITHOUT_ZERO_SNR: Final = ("heun", "pndm")
"""Names whose classes ignore ``rescale_betas_zero_snr``."""
_EULER_FLOW_ONLY: Final = (
    *("use_dynamic_shifting", "shift_terminal", "invert_sigmas", "stochastic_sampling"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
)
"""Settings of flow-matching models that only the Euler scheduler has."""
_PACKAGES: Final = {"LMSDiscreteScheduler": "scipy", "DPMSolverSDEScheduler": "torchsde"}
"""Python packages that classes need."""


def fitting_names(names: Sequence[str], class_name: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return those of the family's ``names`` that fit a model whose own scheduler is this one."""
    if class_name.startswith("EDM"):
        return tuple(name for name in names if name in {"dpm++", "euler"})
    if config.get("rescale_betas_zero_snr"):
        return tuple(name for name in names if name not in _WITHOUT_ZERO_SNR)
    if class_name in FLOW and any(config.get(key) for key in _EULER_FLOW_ONLY):
        return tuple(name for name in names if name != "heun" or SHORT_NAMES.get(class_name) == "heun")
    return tuple(names)


def check_packages(class_name: str, config: Mapping[str, Any]) -> None:
    """Raise ModelUnusable if a package that the model's own scheduler needs cannot be imported."""
    needed = [_PACKAGES[class_name]] if class_name in _PACKAGES else []
    if config.get("use_beta_sigmas"):
        needed.append("scipy")
    for package in needed:
        try:
            import_module(package)
        except ImportError:
            raise ModelUnusable(
                f"the model's scheduler, {class_name}, needs the Python package {package}, which is not"
                f" installed; install it (pip install {package})"
            ) from None


_SD_VALUES: Final = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
}
"""The values that Stable Diffusion was published with. They replace schedulers' defaults where the model's
configuration sets no value: DDIM's default would clip latents to [-1, 1]."""


class Schedulers:
    """A model's schedulers; ``own`` is the one it was published with, and is never changed."""

    def __init__(self, own: Any, *, flow: bool) -> None:
        self._own = own
        self._flow = flow
        self._created: dict[str, Any] = {}

    def get(self, name: str | None) -> Any:
        """Return the scheduler of that name, or the model's own for None; the same object each time.

        Sharing one object is safe: a scheduler resets its state when a pipeline sets its timesteps.
        """
        own = type(self._own).__name__
        if name is None or SHORT_NAMES.get(own) == name:
            return self._own
        if name not in self._created:
            import diffusers

            kind = "FlowMatch" if self._flow else "EDM" if own.startswith("EDM") else ""
            scheduler = getattr(diffusers, _class_name(name, kind))
            self._created[name] = scheduler.from_config(self._config(self._own.config, kind))
        return self._created[name]

    def _config(self, own: Mapping[str, Any], kind: str) -> dict[str, Any]:
        if kind == "FlowMatch":
            shift = own.get("flow_shift")  # the name of it in multistep solvers
            return dict(own) if shift is None else {**own, "shift": shift}
        return dict(own) if kind else {**_SD_VALUES, **own}


def _class_name(name: str, kind: str) -> str:
    """Return the class of that name; ``kind`` is a prefix of _KINDS, or empty for diffusion models."""
    return next(
        class_name
        for class_name, short in SHORT_NAMES.items()
        if short == name and (class_name.startswith(kind) if kind else not class_name.startswith(_KINDS))
    )
