"""Weights that wait in the host's memory and are on the device only while they are used, for small cards.

``model`` keeps one part of a model there at a time (the text encoder, then the denoiser, then the VAE),
``sequential`` one layer. diffusers and accelerate do it by hooks around ``forward``; what an engine calls
beside the pipeline (encoders, ``vae.decode``) passes the same hooks. Neither changes a picture.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from text2img.engine.options import EngineOptions, Offload

logger = logging.getLogger(__name__)


def check_offload(options: EngineOptions) -> None:
    """Raise ConfigurationError where the options ask for an offload that cannot be."""
    if options.offload == "none":
        return
    if options.device == "cpu":
        raise ConfigurationError(
            "--offload moves weights between a GPU and the host's memory, and on the cpu they are there"
            " anyway: leave out --offload, or use --device cuda"
        )
    if options.compile == "always":
        raise ConfigurationError(
            "--offload moves the weights that compiled code would hold: leave out --compile always or"
            " --offload"
        )


def choose_offload(options: EngineOptions, device: str) -> Offload:
    """What was asked for; ``none``, with a line in the log, where ``auto`` found no device but the cpu."""
    if device == "cpu" and options.offload != "none":
        logger.warning(
            "no GPU was found: the model is on the cpu, and --offload %s does nothing", options.offload
        )
        return "none"
    return options.offload


def offload(pipe: Any, how: Offload, device: str) -> None:
    """Let the weights of ``pipe``, now in the host's memory, go to ``device`` only while they are used.

    To be called after whatever replaces a part's ``forward``: what came later would bypass the hooks.
    """
    if how == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif how == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)


@contextlib.contextmanager
def at_hand(pipe: Any, again: Callable[[], None] | None) -> Iterator[None]:
    """Within it all weights are in the host's memory, as they are, for who changes the model's layers.

    ``again`` offloads the pipeline as before; None where it never was.
    """
    if again is None:
        yield
        return
    pipe.remove_all_hooks()
    try:
        yield
    finally:
        again()


def running_device(module: Any) -> Any:
    """The torch.device on which a module computes, which is not where its weights wait to be used."""
    import torch

    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    found = next((device for device in devices if device is not None), module.device)
    return torch.device(found)
