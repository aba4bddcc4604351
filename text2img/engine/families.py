"""The families of models the engine knows, as far as names and configurations tell: no torch, no weights.

A pipeline class that is not in the table may still run ("other"): what it draws is then decoded by its own
pipeline, and its sizes and schedulers are taken as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

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
}
"""Scheduler classes that a request can name; each name has one class among the diffusion models' and may
have one among the flow-matching models'."""

DIFFUSION: Final = frozenset(name for name in SHORT_NAMES if not name.startswith("FlowMatch")) | {
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "TCDScheduler",
}
FLOW: Final = frozenset(
    {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"}
)


@dataclass(frozen=True, slots=True)
class Family:
    """What holds for all models of one pipeline class.

    ``denoiser`` is its noise predictor's component; ``needs`` what must be listed beside it; ``flow``
    whether it was trained by flow matching, so that only such schedulers fit; ``packed`` whether latents
    come as (n, h/2·w/2, 4c); ``patch`` how many latent pixels a side one token covers; ``names`` the
    schedulers that can be asked for.
    """

    name: str
    denoiser: str
    needs: tuple[str, ...]
    names: tuple[str, ...]
    flow: bool = False
    packed: bool = False
    patch: int = 1

    def runs_with(self, scheduler: str, config: dict[str, object]) -> bool:
        """Whether the scheduler class is of the kind the model was trained for.

        A multistep solver fits a flow-matching model when it is told to solve flows.
        """
        if self.flow:
            return scheduler in FLOW or (scheduler in DIFFUSION and bool(config.get("use_flow_sigmas")))
        return scheduler in DIFFUSION and not config.get("use_flow_sigmas")


_ALL: Final = ("dpm++", "euler", "euler-a", "ddim", "unipc", "pndm", "heun", "lcm")
_SD: Final = ("vae", "scheduler", "text_encoder", "tokenizer")

FAMILIES: Final = {
    "StableDiffusionPipeline": Family("sd", "unet", _SD, _ALL),
    "StableDiffusionXLPipeline": Family("sdxl", "unet", (*_SD, "text_encoder_2", "tokenizer_2"), _ALL),
    "StableDiffusion3Pipeline": Family(
        "sd3",
        "transformer",
        (*_SD, "text_encoder_2", "tokenizer_2"),
        ("euler", "heun"),
        flow=True,
        patch=2,
    ),
    # Heun's scheduler takes no list of sigmas, and FluxPipeline always passes one.
    "FluxPipeline": Family(
        "flux",
        "transformer",
        (*_SD, "text_encoder_2", "tokenizer_2"),
        ("euler",),
        flow=True,
        packed=True,
        patch=2,
    ),
}
OTHER: Final = Family("other", "", ("scheduler",), ())
