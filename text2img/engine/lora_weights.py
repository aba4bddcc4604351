"""Read a LoRA file into weights for a pipeline's modules, and reject a file that does not fit completely.

diffusers skips unknown keys, only logs partial matches, and loads NaN. Here every tensor of the file must
belong to a module of the model and have its shape. Scales (alphas, and those in diffusers' metadata) are
multiplied into the weights, so that an adapter's own scale is always 1. Trainers' key names (diffusers',
kohya's) become peft's by diffusers' own conversions.

What the file's header shows is checked first, on tensors without content: a file that does not fit is not
read. One that is read takes at most twice its size, even where its weights become fp32.
"""

from __future__ import annotations

import json
import math
import struct
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from text2img.engine.devices import one_line
from text2img.errors import ErrorCode, PromptFailed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from io import BufferedReader

    Tensors = dict[str, Any]

_UPS: Final = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight", ".lora_linear_layer.up.weight")
_HALVES: Final = (".lora_A.weight", ".lora_B.weight")
_OTHER_KINDS: Final = {
    "dora_scale": "DoRA, whose magnitudes are not supported",
    "lora_magnitude_vector": "DoRA, whose magnitudes are not supported",
    ".hada_w": "LoHa, whose Hadamard products are not supported",
    ".lokr_w": "LoKr, whose Kronecker products are not supported",
    ".oft_": "OFT, whose rotations are not supported",
}
"""Parts of key names by which a relative of LoRA is recognized, and its name."""
_PEFT_PREFIX: Final = "base_model.model."
"""The beginning of key names in the file that peft's own ``save_pretrained`` writes."""
_PEFT_FILE: Final = "adapter_model.safetensors"
_COMFY_PREFIX: Final = "diffusion_model."
"""The beginning of key names for the denoiser in ComfyUI."""
_DENOISERS: Final = ("unet", "transformer")
_TYPES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""The types of weights: the format's names and torch's."""
_NUMBER_TYPES: Final = {**_TYPES, "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
"""The types of alphas."""
_TYPE_NAMES: Final = "floating-point numbers (F16, BF16, F32, F64 or F8)"
_PIECE_BYTES: Final = 2**17  # a multiple of every type's size
_MAX_RANK: Final = 1_024
"""The maximum rank of a LoRA, unless its module is larger: beyond it a file only takes memory."""
_CHECKED_VALUES: Final = 2**16  # checked at once


def read_lora(file: str, pipe: Any) -> dict[str, Tensors]:
    """Return the LoRA's weights by pipeline component, with peft's key names, in the components' dtypes.

    A module's two halves are ``PATH.lora_A.weight`` (rank, inputs, …) and ``PATH.lora_B.weight`` (outputs,
    rank, …); their product is added to the module's weight. Raises PromptFailed (``lora_failed``).
    """
    outline, metadata = _outline(file)
    metadata = metadata or _peft_metadata(file, outline, pipe)
    weights, alphas = _without_alphas(outline)
    _check_outline(weights, metadata, pipe)
    components = _converted(_read(file, weights, alphas, _work_dtype(pipe, metadata)), metadata, pipe)
    _check_fit(pipe, components)
    return {
        component: _cast(weights, getattr(pipe, component).dtype) for component, weights in components.items()
    }


def _converted(tensors: Tensors, metadata: Mapping[str, Any], pipe: Any) -> dict[str, Tensors]:
    """Return the tensors by component, with peft's key names, and with the metadata's scales in them."""
    try:
        named = _by_component(pipe, tensors)
        return {
            component: _scaled(weights, _metadata_of(metadata, component))
            for component, weights in named.items()
        }
    except PromptFailed:
        raise
    except Exception as exc:
        reason = f"its keys are not those of a LoRA for this model ({one_line(exc)[:200]})"
        raise unusable_lora(reason) from exc


def _work_dtype(pipe: Any, metadata: Mapping[str, Any]) -> Any:
    """Return the type that weights are read into: the model's, or fp32 where they are still to be scaled."""
    import torch

    components = (getattr(pipe, name, None) for name in pipe._lora_loadable_modules)  # noqa: SLF001
    dtypes = {component.dtype for component in components if component is not None}
    return dtypes.pop() if len(dtypes) == 1 and not metadata else torch.float32


def unusable_lora(reason: str) -> PromptFailed:
    """Return the failure of every prompt that requested the LoRA."""
    return PromptFailed(ErrorCode.LORA_FAILED, f"the LoRA cannot be used: {reason}")


def _outline(file: str) -> tuple[Tensors, Mapping[str, Any]]:
    """Return tensors of the file's names, shapes and types, without content, and diffusers' metadata."""
    import torch
    from safetensors import SafetensorError, safe_open

    outline: Tensors = {}
    try:
        with safe_open(file, framework="numpy") as opened:  # torch's would map the whole file to write to it
            metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata") or "{}")
            for key in opened.keys():  # noqa: SIM118 - it is not a dictionary
                part = opened.get_slice(key)
                shape, type_name = part.get_shape(), part.get_dtype()
                if key.endswith(".alpha") and math.prod(shape) != 1:
                    raise unusable_lora(f"{key[:120]} is not a single number")
                if type_name not in (_NUMBER_TYPES if key.endswith(".alpha") else _TYPES):
                    raise unusable_lora(f"{key[:120]} is of the type {type_name}; weights are {_TYPE_NAMES}")
                dtype = getattr(torch, _NUMBER_TYPES[type_name])
                outline[key] = torch.empty(shape, dtype=dtype, device="meta")
    except (SafetensorError, OSError, ValueError, RecursionError) as exc:
        raise unusable_lora(f"it is not a valid safetensors file ({one_line(exc)[:200]})") from exc
    if not outline:
        raise unusable_lora("its file is empty")
    for mark, what in _OTHER_KINDS.items():
        if any(mark in key for key in outline):
            raise unusable_lora(f"it is a {what}; a LoRA of two halves a module is needed")
    if not isinstance(metadata, dict):
        raise unusable_lora("the scale in its metadata cannot be read")
    return outline, metadata


def _check_outline(outline: Tensors, metadata: Mapping[str, Any], pipe: Any) -> None:
    """Raise PromptFailed unless the weights fit the model by their names and shapes.

    Some of diffusers' conversions need the weights themselves; then only the file's content decides.
    """
    try:
        components = _converted(outline, metadata, pipe)
    except PromptFailed as exc:
        if "meta" in str(exc.__cause__).lower():  # torch's word for tensors without content
            return
        raise
    _check_fit(pipe, components)


def _read(file: str, outline: Tensors, alphas: Mapping[str, str], dtype: Any) -> Tensors:
    """Return the file's tensors in that dtype; upper halves are multiplied by their alpha / rank.

    The library would map the whole file into memory, beside the tensors: here small pieces are read.
    """
    import torch

    tensors: Tensors = {}
    try:
        with Path(file).open("rb") as opened:
            header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
            content = opened.tell()
            for key, expected in outline.items():
                scale = 1.0
                if key in alphas:
                    (alpha,) = _pieces(opened, content, header[alphas[key]])
                    scale = alpha.item() / expected.shape[1]
                tensors[key] = torch.empty(expected.shape, dtype=dtype)
                left = tensors[key].view(-1)
                for piece in _pieces(opened, content, header[key]):
                    part, left = left[: len(piece)], left[len(piece) :]
                    part.copy_(piece.float() * scale if key in alphas else piece)
    except (OSError, ValueError, struct.error) as exc:
        raise unusable_lora(f"it is not a valid safetensors file ({one_line(exc)[:200]})") from exc
    return tensors


def _pieces(opened: BufferedReader, content: int, entry: Mapping[str, Any]) -> Iterator[Any]:
    """Yield a tensor's values, all in one buffer; ``content`` is where the tensors begin in the file."""
    import torch

    start, end = (content + offset for offset in entry["data_offsets"])
    opened.seek(start)
    buffer = memoryview(bytearray(min(_PIECE_BYTES, end - start)))
    for position in range(start, end, _PIECE_BYTES):
        piece = buffer[: end - position]
        if opened.readinto(piece) < len(piece):
            raise ValueError("it ends too soon")
        yield torch.frombuffer(piece, dtype=getattr(torch, _NUMBER_TYPES[entry["dtype"]]))


def _without_alphas(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    """Return the tensors without alphas, and the names of alphas (``X.alpha``) by those of upper halves."""
    kept = {key: value for key, value in tensors.items() if not key.endswith(".alpha")}
    alphas: dict[str, str] = {}
    for key in tensors.keys() - kept.keys():
        stem = key.removesuffix(".alpha")
        up = next((stem + end for end in _UPS if stem + end in kept), None)
        if up is None:
            raise unusable_lora(f"{key} scales a module that is not in the file")
        if kept[up].ndim < 2 or not kept[up].shape[1]:
            raise unusable_lora(f"{up[:120]} has no rank")
        alphas[up] = key
    return kept, alphas


def _by_component(pipe: Any, tensors: Tensors) -> dict[str, Tensors]:
    """Return the tensors by component, with peft's key names."""
    if all(key.startswith(_PEFT_PREFIX) for key in tensors):
        named = {_peft_name(key): value for key, value in tensors.items()}
        return {_owner(pipe, named): named}
    if all(key.startswith(_COMFY_PREFIX) and key.endswith(_HALVES) for key in tensors):
        named = {key.removeprefix(_COMFY_PREFIX): value for key, value in tensors.items()}
        denoiser = next((name for name in _DENOISERS if _has_all(getattr(pipe, name, None), named)), None)
        if denoiser is not None:
            return {denoiser: named}
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


def _peft_name(key: str) -> str:
    """Return peft's key name without the prefix and the adapter's name that peft may put before its end."""
    path = key.removeprefix(_PEFT_PREFIX)
    for half in _HALVES:
        stem = half.removesuffix(".weight")
        head, found, rest = path.rpartition(f"{stem}.")
        if found and rest.endswith("weight"):
            return head + half
    return path


def _owner(pipe: Any, weights: Tensors) -> str:
    """Return the component to which peft's own file belongs, whose keys do not name it."""
    loadable = pipe._lora_loadable_modules  # noqa: SLF001 - diffusers has no public name for it
    names: list[str] = [name for name in loadable if getattr(pipe, name, None) is not None]
    return next((name for name in names if _has_all(getattr(pipe, name), weights)), names[0])


def _has_all(component: Any, weights: Tensors) -> bool:
    """Return True if each weight has a module in the component."""
    return all(_target(component, key) is not None for key in weights)


def _peft_metadata(file: str, outline: Tensors, pipe: Any) -> Mapping[str, Any]:
    """Return the scale of peft's own file as metadata; it is in another file, beside it.

    Without that file, as for one that was fetched or renamed, the scale is 1, unless the file has peft's own
    name: then its owner knows of the other one. Raises PromptFailed where the scale is not known.
    """
    if not all(key.startswith(_PEFT_PREFIX) for key in outline):
        return {}
    config = Path(file).with_name("adapter_config.json")
    if not config.is_file():
        if Path(file).name == _PEFT_FILE:
            raise unusable_lora(
                "it is peft's own file, and the adapter_config.json with its scale is missing"
            )
        return {}
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        owner = _owner(pipe, {_peft_name(key): value for key, value in outline.items()})
        return {f"{owner}.{name}": value for name, value in content.items()}
    except (OSError, ValueError, AttributeError) as exc:
        raise unusable_lora(f"its adapter_config.json cannot be read ({one_line(exc)[:100]})") from exc


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
        scaled[key] = weights[key].float() * (
            alpha / (math.sqrt(rank) if metadata.get("use_rslora") else rank)
        )
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
            f"{count} to a module of this model; {unknown[0][:120]} does not. It is for another"
            " model, or its names are in a form that is not read"
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
    rank = value.shape[1 - axis] if value.ndim > 1 else 0
    if rank > max(_MAX_RANK, outputs, inputs):
        raise unusable_lora(f"{name[:120]} has the rank {rank:,}, which is larger than its module")
    fits = value.ndim == module.weight.ndim and value.shape[axis] == expected
    if not fits or (is_lower and list(value.shape[2:]) != kernel):
        raise unusable_lora(
            f"{name[:120]} has the shape {tuple(value.shape)} and the model's module is"
            f" {tuple(module.weight.shape)}. It is for another model"
        )


def _cast(weights: Tensors, dtype: Any) -> Tensors:
    """Return the weights in that dtype, and empty ``weights``; raise PromptFailed if any is not finite."""
    cast: Tensors = {}
    invalid: list[str] = []
    for key in list(weights):
        cast[key] = weights.pop(key).to(dtype)
        if not _is_finite(cast[key]):
            invalid.append(key)
    if invalid:
        raise unusable_lora(
            f"{len(invalid):,} of its weights hold values that are not finite, such as {min(invalid)[:120]}"
        )
    return cast


def _is_finite(value: Any) -> bool:
    """Return True if all values are finite; checked in parts, since each takes memory of its own."""
    import torch

    return all(bool(torch.isfinite(part).all()) for part in value.flatten().split(_CHECKED_VALUES))
