"""A tiny autoencoder in the place of a model's own: it decodes in a fraction of the time, and less exactly.

Such as TAESD (Ollin Boer Bohan, 2023), distilled from the model's own. It takes latents as the denoiser
leaves them: its scaling factor is 1 by its configuration, which the decoder reads as it reads the others'.
No torch, and no weights.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from text2img.engine.hub import find_autoencoder
from text2img.engine.model_folder import Component, ModelFolder, read_json
from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

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
