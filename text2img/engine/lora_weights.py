"""From a LoRA's file to weights that fit a pipeline's modules, each of them accounted for.

diffusers passes over keys that it does not know, logs where only some match, and loads NaN. Here every tensor
of the file must belong to a module of the model and have its shape. What scales them (alphas, and what
diffusers writes into the file's metadata) is worked into the weights: an adapter's own scale is always 1. The
names that trainers use (diffusers', kohya's) become peft's by diffusers' own conversions.
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
    """The LoRA's weights by component of the pipeline, named as peft names them, in the components' dtypes.

    A module's two halves are ``PATH.lora_A.weight`` (rank, inputs, …) and ``PATH.lora_B.weight`` (outputs,
    rank, …); what is added to the module's weight is their product. Raises PromptFailed (``lora_failed``).
    """
    tensors, metadata = _read(file)
    try:
        named = _by_component(pipe, _without_alphas(tensors))
        scaled = {name: _scaled(part, _told(metadata, name)) for name, part in named.items()}
    except PromptFailed:
        raise
    except Exception as exc:
        raise refused(f"its keys are not those of a LoRA for this model ({one_line(exc)[:200]})") from exc
    _check_fit(pipe, scaled)
    return {name: _cast(part, getattr(pipe, name).dtype) for name, part in scaled.items()}


def refused(why: str) -> PromptFailed:
    """The failure of all prompts that asked for a LoRA."""
    return PromptFailed(ErrorCode.LORA_FAILED, f"the LoRA cannot be used: {why}")


def _read(file: str) -> tuple[Tensors, Mapping[str, Any]]:
    """The file's tensors in fp32, and what diffusers wrote into its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key).float() for key in opened.keys()}  # noqa: SIM118
            told = json.loads((opened.metadata() or {}).get("lora_adapter_metadata") or "{}")
    except (SafetensorError, OSError, ValueError, RecursionError) as exc:
        raise refused(f"it is no sound safetensors file ({one_line(exc)[:200]})") from exc
    if not tensors:
        raise refused("its file is empty")
    if any("dora_scale" in key or "lora_magnitude_vector" in key for key in tensors):
        raise refused("it is a DoRA, whose magnitudes are not supported")
    if not isinstance(told, dict):
        raise refused("what its metadata says of its scale cannot be read")
    return tensors, told


def _without_alphas(tensors: Tensors) -> Tensors:
    """The tensors, with each ``X.alpha`` worked into the upper half of X: times alpha through rank."""
    kept = {key: value for key, value in tensors.items() if not key.endswith(".alpha")}
    for key in tensors.keys() - kept.keys():
        stem = key.removesuffix(".alpha")
        up = next((stem + end for end in _UPS if stem + end in kept), None)
        if up is None:
            raise refused(f"{key} scales nothing that is in the file")
        kept[up] = kept[up] * (tensors[key].item() / kept[up].shape[1])
    return kept


def _by_component(pipe: Any, tensors: Tensors) -> dict[str, Tensors]:
    """The tensors by component, in peft's names."""
    unet = getattr(pipe, "unet", None)
    converted = pipe.lora_state_dict(dict(tensors), **({"unet_config": unet.config} if unet else {}))
    parts: dict[str, Tensors] = defaultdict(dict)
    for key, value in (converted[0] if isinstance(converted, tuple) else converted).items():
        component, _, rest = key.partition(".")
        parts[component][rest] = value
    for component, part in parts.items():
        named = part if all(key.endswith(_HALVES) for key in part) else _in_pefts_names(part, component)
        if not hasattr(getattr(pipe, component, None), "text_model"):  # CLIP's, as it was once built
            named = {key.removeprefix("text_model."): value for key, value in named.items()}
        parts[component] = named
    return dict(parts)


def _in_pefts_names(part: Tensors, component: str) -> Tensors:
    """What diffusers, now or of old, calls a component's weights, in peft's names."""
    from diffusers.utils import convert_state_dict_to_peft
    from diffusers.utils.state_dict_utils import StateDictType, convert_unet_state_dict_to_peft

    if component in _DENOISERS:
        return dict(convert_unet_state_dict_to_peft(part))
    old = any("_lora." in key for key in part)
    kind = StateDictType.DIFFUSERS_OLD if old else StateDictType.DIFFUSERS
    return dict(convert_state_dict_to_peft(part, original_type=kind))


def _told(metadata: Mapping[str, Any], component: str) -> dict[str, Any]:
    """What the file's metadata says of the component."""
    start = f"{component}."
    return {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}


def _scaled(part: Tensors, told: Mapping[str, Any]) -> Tensors:
    """The component's weights, with the scale that its metadata tells worked into the upper halves."""
    if not told:
        return part
    if told.get("use_dora"):
        raise refused("it is a DoRA, whose magnitudes are not supported")
    alphas: Mapping[str, float] = told.get("alpha_pattern") or {}
    scaled = dict(part)
    for key in (key for key in part if key.endswith(_HALVES[1])):
        path, rank = key.removesuffix(_HALVES[1]), part[key].shape[1]
        own = (value for name, value in alphas.items() if f".{path}".endswith(f".{name.lstrip('^')}"))
        alpha = float(next(own, told.get("lora_alpha") or rank))
        scaled[key] = part[key] * (alpha / (math.sqrt(rank) if told.get("use_rslora") else rank))
    return scaled


def _check_fit(pipe: Any, parts: Mapping[str, Tensors]) -> None:
    """Raise unless each weight belongs to a module of the model, has its shape, and has its other half."""
    loadable = pipe._lora_loadable_modules  # noqa: SLF001 - diffusers has no other word for it
    places = {
        f"{component}.{key}": (getattr(pipe, component, None) if component in loadable else None, key, value)
        for component, part in parts.items()
        for key, value in part.items()
    }
    strangers = sorted(full for full, (module, key, _) in places.items() if _target(module, key) is None)
    if strangers:
        known = len(places) - len(strangers)
        count = (
            f"only {known:,} of its {len(places):,} weights belong"
            if known
            else "none of its weights belongs"
        )
        raise refused(
            f"{count} to a module of this model; {strangers[0][:120]} does not. It is for another model"
        )
    for full, (module, key, value) in places.items():
        other = key.replace(*(_HALVES if key.endswith(_HALVES[0]) else _HALVES[::-1]))
        if f"{full.partition('.')[0]}.{other}" not in places:
            raise refused(f"{full[:120]} is there without its other half")
        _check_shape(full, _target(module, key), value)


def _target(component: Any, key: str) -> Any:
    """The module that the weight is for; None where the model has no such module."""
    if component is None or not key.endswith(_HALVES):
        return None
    try:
        module = component.get_submodule(key.removesuffix(_HALVES[0]).removesuffix(_HALVES[1]))
    except AttributeError:
        return None
    return module if getattr(module, "weight", None) is not None else None


def _check_shape(full: str, module: Any, value: Any) -> None:
    """Raise where the half is not as wide as the module's inputs or outputs: another size of the family's."""
    outputs, inputs, *kernel = module.weight.shape
    lower = full.endswith(_HALVES[0])
    side, mine = (1, inputs) if lower else (0, outputs)
    fits = value.ndim == module.weight.ndim and value.shape[side] == mine
    if not fits or (lower and list(value.shape[2:]) != kernel):
        raise refused(
            f"{full[:120]} has the shape {tuple(value.shape)} and the model's module is"
            f" {tuple(module.weight.shape)}. It is for another model"
        )


def _cast(part: Tensors, dtype: Any) -> Tensors:
    """The weights in that dtype; raises where one is not finite then."""
    import torch

    cast = {key: value.to(dtype) for key, value in part.items()}
    bad = sorted(key for key, value in cast.items() if not torch.isfinite(value).all())
    if bad:
        raise refused(f"{len(bad):,} of its weights hold values that are not finite, such as {bad[0][:120]}")
    return cast
