"""Read a LoRA file into weights for a pipeline's modules, and reject a file that does not fit completely.

diffusers skips unknown keys, only logs partial matches, and loads NaN. Here every tensor of the file must
belong to a module of the model and have its shape. Scales (alphas, and those in diffusers' metadata) are
multiplied into the weights, so that an adapter's own scale is always 1. Trainers' key names (diffusers',
kohya's) become peft's by diffusers' own conversions.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from text2img.engine.devices import one_line
from text2img.errors import ErrorCode, PromptFailed

if TYPE_CHECKING:
    from collections.abc import Mapping

    Tensors = dict[str, Any]

_UPS: Final = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight", ".lora_linear_layer.up.weight")
_HALVES: Final = (".lora_A.weight", ".lora_B.weight")
_DENOISERS: Final = ("unet", "transformer")


def read_lora(file: str, pipe: Any) -> dict[str, Tensors]:
    """Return the LoRA's weights by pipeline component, with peft's key names, in the components' dtypes.

    A module's two halves are ``PATH.lora_A.weight`` (rank, inputs, …) and ``PATH.lora_B.weight`` (outputs,
    rank, …); their product is added to the module's weight. Raises PromptFailed (``lora_failed``).
    """
    tensors, metadata = _read(file)
    try:
        named = _by_component(pipe, _without_alphas(tensors))
        scaled = {
            component: _scaled(weights, _metadata_of(metadata, component))
            for component, weights in named.items()
        }
    except PromptFailed:
        raise
    except Exception as exc:
        reason = f"its keys are not those of a LoRA for this model ({one_line(exc)[:200]})"
        raise unusable_lora(reason) from exc
    _check_fit(pipe, scaled)
    return {
        component: _cast(weights, getattr(pipe, component).dtype) for component, weights in scaled.items()
    }


def unusable_lora(reason: str) -> PromptFailed:
    """Return the failure of every prompt that requested the LoRA."""
    return PromptFailed(ErrorCode.LORA_FAILED, f"the LoRA cannot be used: {reason}")


def _read(file: str) -> tuple[Tensors, Mapping[str, Any]]:
    """Return the file's tensors in fp32, and the metadata that diffusers wrote into it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key).float() for key in opened.keys()}  # noqa: SIM118
            metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata") or "{}")
    except (SafetensorError, OSError, ValueError, RecursionError) as exc:
        raise unusable_lora(f"it is not a valid safetensors file ({one_line(exc)[:200]})") from exc
    if not tensors:
        raise unusable_lora("its file is empty")
    if any("dora_scale" in key or "lora_magnitude_vector" in key for key in tensors):
        raise unusable_lora("it is a DoRA, whose magnitudes are not supported")
    if not isinstance(metadata, dict):
        raise unusable_lora("the scale in its metadata cannot be read")
    return tensors, metadata


def _without_alphas(tensors: Tensors) -> Tensors:
    """Return the tensors without alphas: the upper half of X is multiplied by ``X.alpha`` / rank."""
    kept = {key: value for key, value in tensors.items() if not key.endswith(".alpha")}
    for key in tensors.keys() - kept.keys():
        stem = key.removesuffix(".alpha")
        up = next((stem + end for end in _UPS if stem + end in kept), None)
        if up is None:
            raise unusable_lora(f"{key} scales a module that is not in the file")
        kept[up] = kept[up] * (tensors[key].item() / kept[up].shape[1])
    return kept


def _by_component(pipe: Any, tensors: Tensors) -> dict[str, Tensors]:
    """Return the tensors by component, with peft's key names."""
    unet = getattr(pipe, "unet", None)
    converted = pipe.lora_state_dict(dict(tensors), **({"unet_config": unet.config} if unet else {}))
    components: dict[str, Tensors] = defaultdict(dict)
    for key, value in (converted[0] if isinstance(converted, tuple) else converted).items():
        component, _, rest = key.partition(".")
        components[component][rest] = value
    for component, weights in components.items():
        has_peft_names = all(key.endswith(_HALVES) for key in weights)
        named = weights if has_peft_names else _with_peft_names(weights, component)
        if not hasattr(getattr(pipe, component, None), "text_model"):  # newer CLIP classes have none
            named = {key.removeprefix("text_model."): value for key, value in named.items()}
        components[component] = named
    return dict(components)


def _with_peft_names(weights: Tensors, component: str) -> Tensors:
    """Return a component's weights with peft's key names instead of diffusers' present or former ones."""
    from diffusers.utils import convert_state_dict_to_peft
    from diffusers.utils.state_dict_utils import StateDictType, convert_unet_state_dict_to_peft

    if component in _DENOISERS:
        return dict(convert_unet_state_dict_to_peft(weights))
    is_old = any("_lora." in key for key in weights)
    original_type = StateDictType.DIFFUSERS_OLD if is_old else StateDictType.DIFFUSERS
    return dict(convert_state_dict_to_peft(weights, original_type=original_type))


def _metadata_of(metadata: Mapping[str, Any], component: str) -> dict[str, Any]:
    """Return the entries of the file's metadata for the component."""
    prefix = f"{component}."
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def _scaled(weights: Tensors, metadata: Mapping[str, Any]) -> Tensors:
    """Return the component's weights with its metadata's scale multiplied into the upper halves."""
    if not metadata:
        return weights
    if metadata.get("use_dora"):
        raise unusable_lora("it is a DoRA, whose magnitudes are not supported")
    alphas: Mapping[str, float] = metadata.get("alpha_pattern") or {}
    scaled = dict(weights)
    for key in (key for key in weights if key.endswith(_HALVES[1])):
        path, rank = key.removesuffix(_HALVES[1]), weights[key].shape[1]
        own_alphas = (value for name, value in alphas.items() if f".{path}".endswith(f".{name.lstrip('^')}"))
        alpha = float(next(own_alphas, metadata.get("lora_alpha") or rank))
        scaled[key] = weights[key] * (alpha / (math.sqrt(rank) if metadata.get("use_rslora") else rank))
    return scaled


def _check_fit(pipe: Any, components: Mapping[str, Tensors]) -> None:
    """Raise PromptFailed unless each weight has a module, the module's shape and its other half."""
    loadable = pipe._lora_loadable_modules  # noqa: SLF001 - diffusers has no public name for it
    entries = {
        f"{component}.{key}": (getattr(pipe, component, None) if component in loadable else None, key, value)
        for component, weights in components.items()
        for key, value in weights.items()
    }
    unknown = sorted(name for name, (model, key, _) in entries.items() if _target(model, key) is None)
    if unknown:
        known = len(entries) - len(unknown)
        count = (
            f"only {known:,} of its {len(entries):,} weights belong"
            if known
            else "none of its weights belongs"
        )
        raise unusable_lora(
            f"{count} to a module of this model; {unknown[0][:120]} does not. It is for another model"
        )
    for name, (model, key, value) in entries.items():
        other = key.replace(*(_HALVES if key.endswith(_HALVES[0]) else _HALVES[::-1]))
        if f"{name.partition('.')[0]}.{other}" not in entries:
            raise unusable_lora(f"{name[:120]} has no other half in the file")
        _check_shape(name, _target(model, key), value)


def _target(component: Any, key: str) -> Any:
    """Return the module that the weight is for; None if the model has no such module."""
    if component is None or not key.endswith(_HALVES):
        return None
    try:
        module = component.get_submodule(key.removesuffix(_HALVES[0]).removesuffix(_HALVES[1]))
    except AttributeError:
        return None
    return module if getattr(module, "weight", None) is not None else None


def _check_shape(name: str, module: Any, value: Any) -> None:
    """Raise PromptFailed unless the half matches the module's inputs or outputs.

    A mismatch means a LoRA for a model of the same family but of another size.
    """
    outputs, inputs, *kernel = module.weight.shape
    is_lower = name.endswith(_HALVES[0])
    axis, expected = (1, inputs) if is_lower else (0, outputs)
    fits = value.ndim == module.weight.ndim and value.shape[axis] == expected
    if not fits or (is_lower and list(value.shape[2:]) != kernel):
        raise unusable_lora(
            f"{name[:120]} has the shape {tuple(value.shape)} and the model's module is"
            f" {tuple(module.weight.shape)}. It is for another model"
        )


def _cast(weights: Tensors, dtype: Any) -> Tensors:
    """Return the weights in that dtype; raise PromptFailed if any is not finite in it."""
    import torch

    cast = {key: value.to(dtype) for key, value in weights.items()}
    invalid = sorted(key for key, value in cast.items() if not torch.isfinite(value).all())
    if invalid:
        raise unusable_lora(
            f"{len(invalid):,} of its weights hold values that are not finite, such as {invalid[0][:120]}"
        )
    return cast
