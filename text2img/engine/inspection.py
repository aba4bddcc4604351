"""What can be known of a model before its weights are read: whether it is whole, what it is, what it draws.

Needs no torch for the families in ``families``; other pipelines are looked up in diffusers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from text2img.engine import ModelCard
from text2img.engine.component_checks import check_agreement
from text2img.engine.families import SHORT_NAMES
from text2img.engine.model_folder import Kind, ModelFolder
from text2img.engine.vocabulary import check_vocabularies
from text2img.engine.weight_files import check_whole, choose_variant, weight_files
from text2img.errors import ModelFailed

if TYPE_CHECKING:
    from collections.abc import Mapping


_LCM_STEPS = 50  # diffusers' LCMScheduler, where the model does not say


def check_model(model: ModelFolder, variant: str | None) -> dict[str, str | None]:
    """Check all that can be known without the weights' values; the variant to load for each component.

    Raises ModelFailed with what is wrong and what to do about it.
    """
    _check_pipeline(model)
    check_agreement(model)
    check_vocabularies(model.components)
    variants: dict[str, str | None] = {}
    for name, component in model.components.items():
        if component.kind is not Kind.MODEL:
            continue
        files = [file.name for file in component.folder.iterdir()]
        chosen = choose_variant(files, component.stem, variant, str(component.folder))
        for file in weight_files(component.folder, component.stem, chosen):
            check_whole(file)
        variants[name] = chosen
    return variants


def card(model: ModelFolder, name: str) -> ModelCard:
    """The model's card, from its configurations alone."""
    scheduler = model.components.get("scheduler")
    class_name = scheduler.class_name if scheduler else "none"
    own = SHORT_NAMES.get(class_name, class_name)
    width, height = _own_size(model)
    return ModelCard(
        name=name,
        revision=model.revision,
        family=model.family.name,
        width=width,
        height=height,
        multiple=_multiple(model),
        scheduler=own,
        schedulers=model.family.names,
        largest=_largest(model),
        longest=_longest(model, own),
    )


def _longest(model: ModelFolder, own: str) -> dict[str, int]:
    """The most steps by scheduler: as many as it was trained with, LCM's as it was distilled from."""
    config = _config(model, "scheduler")
    ends = dict.fromkeys((own, *model.family.names), config.get("num_train_timesteps"))
    if not model.family.flow:
        ends["lcm"] = config.get("original_inference_steps", _LCM_STEPS)
    return {name: steps for name, steps in ends.items() if isinstance(steps, int)}


def _largest(model: ModelFolder) -> int | None:
    """The most pixels a side can have, where the denoiser's positions end somewhere."""
    size = _config(model, model.family.denoiser).get("pos_embed_max_size")
    return size * model.family.patch * _vae_factor(model) if isinstance(size, int) else None


def _check_pipeline(model: ModelFolder) -> None:
    """The class must be one that draws from text alone, by the table or by diffusers' own list."""
    if model.family.names:
        return
    from text2img.engine.silence import hush, quiet

    with quiet():
        hush()
        from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    known = {pipeline.__name__ for pipeline in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}
    needs_more = ("ControlNet", "Control", "Kontext")
    if model.pipeline not in known or any(word in model.pipeline for word in needs_more):
        raise ModelFailed(f"{model.pipeline} draws no pictures from text alone; use a model that does")


def _own_size(model: ModelFolder) -> tuple[int, int]:
    """Width and height in pixels of the pictures the model was trained on.

    Flux was trained on many and its configuration names none; its pipeline takes 128 latent pixels.
    """
    denoiser = model.family.denoiser or ("unet" if "unet" in model.components else "transformer")
    size = _config(model, denoiser).get("sample_size")
    size = 128 if size is None else size
    height, width = size if isinstance(size, list) else (size, size)
    factor = _vae_factor(model)
    return int(width) * factor, int(height) * factor


def _multiple(model: ModelFolder) -> int:
    """What width and height must be multiples of: a latent pixel, times a token's side; 8 in any case."""
    return math.lcm(8, _vae_factor(model) * model.family.patch)


def _vae_factor(model: ModelFolder) -> int:
    """Pixels a side of one latent pixel: the VAE halves the picture between its levels."""
    levels = _config(model, "vae").get("block_out_channels") or [0] * 4
    return int(2 ** (len(levels) - 1))


def _config(model: ModelFolder, name: str) -> Mapping[str, Any]:
    component = model.components.get(name)
    return component.config if component else {}
