"""A model in one file: what it holds is taken from it, the rest from a whole model folder, the base.

The file is a ``.safetensors`` file in its makers' key names (or diffusers' own, for a denoiser alone), or a
``.gguf`` file of a denoiser. The base lends configurations, tokenizers, the scheduler, and the weights of
components that the file lacks. diffusers converts the weights by the base's configuration and never looks
for one itself. It drops unknown weights in silence and leaves missing ones empty, so the conversion is first
tried without values, by the file's header alone.
"""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from text2img.engine.devices import require, silence_libraries, suppress_warnings
from text2img.engine.model_folder import Component, Kind, ModelFolder, check_whole, class_of, read_folder
from text2img.errors import ConfigurationError, ModelFailed
from text2img.settings import expand_home

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from text2img.engine import EngineOptions

    Find = Callable[[EngineOptions], tuple[Path, str | None]]
    Shapes = Mapping[str, tuple[int, ...]]


_PICKLES: Final = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_GGUF: Final = ".gguf"
_SUFFIXES: Final = (".safetensors", _GGUF, *_PICKLES)
_DENOISERS: Final = ("unet", "transformer")
_DENOISER_PREFIX: Final = "model.diffusion_model."
_PREFIXES: Final = {
    "first_stage_model.": "vae",
    "vae.": "vae",
    "cond_stage_model.transformer.": "text_encoder",
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "t5",
}
_OPEN_CLIP: Final = ("cond_stage_model.model.", "conditioner.embedders.1.model.")
"""Prefixes of text encoders in OpenCLIP's key names; the others have transformers'."""
_KINDS: Final = {
    "sd3": ("Stable Diffusion 3", "stabilityai/stable-diffusion-3-medium-diffusers"),
    "flux": ("Flux", "black-forest-labs/FLUX.1-dev"),
    "sdxl": ("Stable Diffusion XL", "stabilityai/stable-diffusion-xl-base-1.0"),
    "sd2": ("Stable Diffusion 2", "stabilityai/stable-diffusion-2-1"),
    "sd": ("Stable Diffusion 1", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
}
"""Kinds of files, with their names and a base for each."""
_UNUSED: Final = re.compile(
    r"model_ema\..*|(.*\.)?(position_ids|logit_scale|spiece_model)|model_sampling\..*|denoiser\.sigmas"
    r"|first_stage_model\.loss\..*|cond_stage_model\.transformer\.text_projection\.weight"
    r"|conditioner\.embedders\.0\.transformer\.text_projection\.weight"
    r"|cond_stage_model\.model\.(text_projection|transformer\.resblocks\.23\..*)"
    r"|(sqrt_|log_)?(one_minus_)?(recip_|recipm1_)?alphas_cumprod(_prev)?|betas|logvar|lvlb_weights"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|global_step|v_pred|ztsnr|edm_(mean|std)"
    r"|scale_factor|edm_vpred\.sigma_(max|min)"
)
"""Keys that no image depends on: training's remains, and flags that are read apart. XL's second encoder has
a text projection that is used; the others' is not."""
_ANOTHER_BASE: Final = "give the base that the file was made from"
_PREDICTION_KEY: Final = "modelspec.prediction_type"
_PREDICTIONS: Final = {"v": "v_prediction", "epsilon": "epsilon"}
"""A file's prediction type, by its metadata, in the words of the Stability AI Model Metadata Standard."""
_ZERO_SNR: Final = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
"""Schedulers that can rescale their betas to zero terminal SNR; the others would ignore the setting."""


def is_single_file(name: str) -> bool:
    """Return True if a model's name is that of a file, by its ending; a folder may have such a name too."""
    return name.lower().endswith(_SUFFIXES) and not ("://" not in name and _local(name).is_dir())


def file_name(name: str) -> str:
    """Return the last part of a single file's name, nothing for a folder's name."""
    return name.rstrip("/").rpartition("/")[2] if is_single_file(name) else ""


def _local(name: str) -> Path:
    return expand_home(name, "--model-id (or model_path)")


def read_single_file(options: EngineOptions, find: Find) -> tuple[ModelFolder, dict[str, str]]:
    """Return the base as a model whose components of the file have it as their ``file``, and what to record.

    Raises ConfigurationError for a file or a base that cannot be used, ModelFailed for one that is broken.
    """
    name = options.model
    if name.lower().endswith(_PICKLES):
        raise ConfigurationError(
            f"{name} is a pickle, and loading those can run code; use a .safetensors file of the model"
        )
    if name.lower().endswith(_GGUF):
        require("gguf", f"{name} is a GGUF file")
    if options.base is None and not _local(name).is_file():
        raise ConfigurationError(_base_needed(name, None))
    file, revision = find(options)
    shapes = read_shapes(file)
    kind, held = _kind(shapes), components_in_file(shapes)
    _check_held(name, shapes, held)
    if options.base is None:
        raise ConfigurationError(_base_needed(name, kind))
    if is_single_file(options.base):
        raise ConfigurationError(f"--model-base {options.base} is a file; give a whole model folder")
    lent = dataclasses.replace(options, model=options.base, revision=None, base=None, without=tuple(held))
    base_path, commit = find(lent)
    base = read_folder(base_path, commit, safety_checker=options.safety_checker)
    _check_kind(name, kind, base, options.base)
    components = dict(base.components)
    for component in held:
        if component in components:
            components[component] = dataclasses.replace(components[component], file=file)
        elif component not in _DENOISERS:
            raise ConfigurationError(
                f"{name} holds a {component}, and the base {options.base} has none; give a base that has one"
            )
    components["scheduler"] = _scheduler(name, file, shapes, base)
    record = {"model_base": options.base if commit is None else f"{options.base}@{commit}"}
    return dataclasses.replace(base, revision=revision, components=components), record


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's tensors by name, without their values; ModelFailed for a broken file."""
    if file.suffix.lower() != _GGUF:
        return check_whole(file)
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(file).tensors
        return {tensor.name: tuple(int(side) for side in reversed(tensor.shape)) for tensor in tensors}
    except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError) as exc:
        raise ModelFailed(f"{file} is truncated or not a GGUF file; fetch it again") from exc


def components_in_file(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return, for each component in the file, its keys with the prefix of each.

    The denoiser, which a base calls ``unet`` or ``transformer``, is under both names. If no key has its
    prefix, all keys that belong to nothing else are the denoiser's.
    """
    keys = list(keys)
    t5 = _t5_component(keys)
    held: dict[str, dict[str, str]] = {}
    rest: dict[str, str] = {}
    for key in keys:
        prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
        if prefix and not _UNUSED.fullmatch(key):
            component = t5 if _PREFIXES[prefix] == "t5" else _PREFIXES[prefix]
            held.setdefault(component, {})[key] = prefix
        elif not prefix and not _UNUSED.fullmatch(key):
            rest[key] = _DENOISER_PREFIX if key.startswith(_DENOISER_PREFIX) else ""
    own = {key: prefix for key, prefix in rest.items() if prefix} or rest
    return held | (dict.fromkeys(_DENOISERS, own) if own else {})


def _t5_component(keys: Iterable[str]) -> str:
    """Return which text encoder T5 is: the third of Stable Diffusion 3, the second of Flux, else the only."""
    encoders = {key.split(".")[1] for key in keys if key.startswith("text_encoders.")}
    kind = _kind(keys)
    if kind == "sd3" or "clip_g" in encoders:
        return "text_encoder_3"
    return "text_encoder_2" if kind == "flux" or "clip_l" in encoders else "text_encoder"


def check_single_file(model: ModelFolder) -> None:
    """Raise ConfigurationError if weights of the file are missing, unknown, or have another shape.

    The base's configuration lists those that there must be.
    """
    file = next((component.file for component in model.components.values() if component.file), None)
    if file is None:
        return
    shapes = read_shapes(file)
    unread = {key for key in shapes if not _UNUSED.fullmatch(key)}
    held = components_in_file(shapes)
    for name in (name for name in held if name in model.components and name not in _DENOISERS):
        if model.components[name].file is None:  # another autoencoder was asked for
            unread -= set(held[name])
    with suppress_warnings():
        silence_libraries()
        for component in model.components.values():
            if component.file is not None and component.kind is Kind.MODEL:
                unread -= _check_component(component, held[component.name], shapes, class_of(component))
    if unread:
        raise ConfigurationError(
            f"{file} holds weights that no component of the base takes: {_listed(unread)}; {_ANOTHER_BASE}"
        )


def sources(model: ModelFolder, options: EngineOptions) -> dict[str, str]:
    """Return where each component is from, the file or the base; nothing for a whole folder."""
    if options.base is None:
        return {}
    components = model.components.values()
    return {
        each.name: f"{options.model}" if each.file is not None else f"{options.base}"
        for each in components
        if each.name != "vae" or options.autoencoder is None
    }


def load_single_file(component: Component, cls: Any, device: str, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """Return the component with the file's weights, and its loading report as ``from_pretrained``'s."""
    file = component.file
    if file is None:
        raise ValueError(f"{component.name} is not from a single file")
    base = {"config": str(component.folder.parent), "subfolder": component.name, "local_files_only": True}
    if file.suffix.lower() == _GGUF:
        from diffusers import GGUFQuantizationConfig

        quantized = GGUFQuantizationConfig(compute_dtype=dtype)
        module = cls.from_single_file(
            str(file), **base, dtype=dtype, device=device, quantization_config=quantized
        )
        return module, {}
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        keys = components_in_file(opened.keys())[component.name]
        weights = {key: opened.get_tensor(key) for key in keys}
    if component.library == "diffusers":
        return cls.from_single_file(weights, **base, dtype=dtype, device=device), {}
    config = _encoder_config(component, cls)
    module, report = cls.from_pretrained(
        None,
        config=config,
        state_dict=_convert_encoder(weights, keys, component, config),
        dtype=dtype,
        output_loading_info=True,
        device_map={"": device},
        trust_remote_code=False,
    )
    return module, report


def _check_held(name: str, shapes: Shapes, held: Mapping[str, object]) -> None:
    if any(".lora_" in key or ".lora." in key or key.startswith("lora_") for key in shapes):
        raise ConfigurationError(
            f"{name} is a LoRA, not a model; give a model, and name the LoRA in prompts or the model"
            " configuration"
        )
    if not any(denoiser in held for denoiser in _DENOISERS):
        only = ", ".join(held) or "nothing that is known"
        raise ConfigurationError(f"{name} holds no denoiser (only {only}); give a model's file")


def _kind(keys: Iterable[str]) -> str | None:
    """Return the key in _KINDS of the file's kind, None if it shows none."""
    names = {key.removeprefix(_DENOISER_PREFIX) for key in keys}
    roots = {name.partition(".")[0] for name in names}
    if "joint_blocks" in roots:
        return "sd3"
    if {"double_blocks", "single_blocks"} <= roots and "vector_in" in roots:
        return "flux"
    starts = {
        "sdxl": ("conditioner.embedders.",),
        "sd2": ("cond_stage_model.model.",),
        "sd": ("cond_stage_model.transformer.",),
    }
    return next((kind for kind, start in starts.items() if any(n.startswith(start) for n in names)), None)


def _base_needed(name: str, kind: str | None) -> str:
    called, example = _KINDS.get(kind or "", ("", "stabilityai/stable-diffusion-xl-base-1.0"))
    what = f"holds a {called} model" if called else "is one file"
    return (
        f"{name} {what} without configuration and tokenizers; give a whole model folder of its kind with"
        f" --model-base (MODEL_BASE), such as {example}"
    )


def _check_kind(name: str, kind: str | None, base: ModelFolder, base_name: str) -> None:
    family = {"sd2": "sd"}.get(kind or "", kind)
    if kind is not None and family != base.family.name and base.family.names:
        called, example = _KINDS[kind]
        raise ConfigurationError(
            f"{name} holds a {called} model, and the base {base_name} is a {base.pipeline}; give a base of"
            f" the file's kind, such as {example}"
        )


def _scheduler(name: str, file: Path, shapes: Shapes, base: ModelFolder) -> Component:
    """Return the base's scheduler with the noise settings of the file's keys: v-prediction, zero SNR, EDM."""
    scheduler = base.components.get("scheduler")
    if scheduler is None:
        raise ConfigurationError(f"the base of {name} lists no scheduler; give another base")
    if any(key.startswith("edm_") for key in shapes) and not scheduler.class_name.startswith("EDM"):
        raise ConfigurationError(
            f"{name} is an EDM model, and the base's scheduler is {scheduler.class_name}; give a base with an"
            " EDM scheduler, such as playgroundai/playground-v2.5-1024px-aesthetic"
        )
    config = dict(scheduler.config)
    if base.family.name in {"sd", "sdxl"} and (named := _PREDICTIONS.get(_metadata(file, _PREDICTION_KEY))):
        config["prediction_type"] = named
    if "v_pred" in shapes:
        config["prediction_type"] = "v_prediction"
    if "ztsnr" in shapes:
        if scheduler.class_name not in _ZERO_SNR:
            raise ConfigurationError(
                f"{name} was trained with zero terminal SNR, which the base's scheduler"
                f" ({scheduler.class_name}) does not support; give a base with one of {', '.join(_ZERO_SNR)}"
            )
        config["rescale_betas_zero_snr"] = True
    return dataclasses.replace(scheduler, config=config, file=None if config == scheduler.config else file)


def _metadata(file: Path, key: str) -> str:
    """Return a value of a safetensors file's metadata, nothing if it has none."""
    if file.suffix.lower() == _GGUF:
        return ""
    from safetensors import safe_open

    with safe_open(file, "numpy") as opened:
        return str((opened.metadata() or {}).get(key, ""))


def _check_component(component: Component, keys: Mapping[str, str], shapes: Shapes, cls: Any) -> set[str]:
    """Return the keys of the file from which the component's weights are made.

    Raises ConfigurationError if the weights are not those that the base's configuration declares.
    """
    if component.library == "diffusers" and not hasattr(cls, "from_single_file"):
        raise ConfigurationError(f"a {component.class_name} cannot be taken from a single file; use a folder")
    model, optional = _empty_model(component, cls)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    traced = {key: _traced(key, shapes[key]) for key in keys}
    where = f"{component.file} does not fit the base's {component.name}"
    try:
        if component.library != "diffusers":
            weights = _convert_encoder(traced, keys, component, model.config)
            flat = not any(key.startswith("text_model.") for key in expected)
            weights = {key.removeprefix("text_model.") if flat else key: weights[key] for key in weights}
        elif set(traced) == set(expected):
            weights = traced
        else:
            weights = _mapping_of(cls)(config=dict(model.config), checkpoint=dict(traced))
    except KeyError as exc:
        raise ConfigurationError(f"{where}: it lacks {exc.args[0]}; {_ANOTHER_BASE}") from exc
    except (RuntimeError, ValueError, IndexError, AttributeError, TypeError) as exc:
        raise ConfigurationError(
            f"{where}: its weights are not named as a {component.class_name}'s; {_ANOTHER_BASE}"
        ) from exc
    problems = {
        "missing": expected.keys() - weights.keys() - optional,
        "unknown": weights.keys() - expected.keys(),
        "misshapen": {key for key in weights.keys() & expected if tuple(weights[key].shape) != expected[key]},
    }
    for problem, found in problems.items():
        if found:
            raise ConfigurationError(
                f"{where}: {len(found)} weights are {problem}, such as {min(found)}; {_ANOTHER_BASE}"
            )
    return {source for weight in weights.values() for source in getattr(weight, "sources", ())}


def _empty_model(component: Component, cls: Any) -> tuple[Any, set[str]]:
    """Return the component without memory for its weights, and the tied keys, which a file may lack."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        if component.library == "diffusers":
            return cls.from_config(cls.load_config(component.folder, local_files_only=True)), set()
        model = cls(_encoder_config(component, cls))
    return model, set(getattr(model, "_tied_weights_keys", None) or ())


def _encoder_config(component: Component, cls: Any) -> Any:
    return cls.config_class.from_pretrained(component.folder, local_files_only=True, trust_remote_code=False)


def _mapping_of(cls: Any) -> Any:
    """Return diffusers' function that converts a checkpoint for this class."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    name = next(
        (base.__name__ for base in cls.__mro__ if base.__name__ in SINGLE_FILE_LOADABLE_CLASSES), None
    )
    if name is None:
        raise ConfigurationError(f"a {cls.__name__} cannot be taken from a single file; use a folder")
    return SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]


def _convert_encoder(
    weights: Mapping[str, Any], keys: Mapping[str, str], component: Component, config: Any
) -> dict[str, Any]:
    """Return a text encoder's weights under transformers' names; ``keys`` has each key's prefix.

    SD3's files leave out the projection of the first encoder, which is then the identity.
    """
    import torch

    prefix = next(iter(keys.values()))
    if prefix in _OPEN_CLIP:
        from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

        model = SimpleNamespace(config=config)
        converted: dict[str, Any] = convert_open_clip_checkpoint(model, dict(weights), prefix=prefix)
    else:
        converted = {key.removeprefix(keys[key]): weight for key, weight in weights.items()}
    projects = component.class_name.endswith("WithProjection")
    if projects and "clip_l" in prefix:
        converted.setdefault("text_projection.weight", torch.eye(config.hidden_size))
    if not projects:
        converted.pop("text_projection.weight", None)
    return converted


def _traced(key: str, shape: tuple[int, ...]) -> Any:
    """Return a tensor without values; it and all tensors made from it know from which keys they are."""
    import torch

    tensor: Any = torch.Tensor

    class Traced(tensor):  # type: ignore[misc]
        sources: frozenset[str] = frozenset()

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_function__(func, types, args, kwargs or {})
            sources = frozenset().union(*(each.sources for each in _flat(args) if hasattr(each, "sources")))
            for each in _flat([result]):
                if isinstance(each, torch.Tensor):
                    each.sources = sources
            return result

    traced = torch.empty(shape, device="meta").as_subclass(Traced)
    traced.sources = frozenset([key])
    return traced


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _listed(keys: Iterable[str]) -> str:
    first, *more = sorted(keys)
    return f"{first} and {len(more)} more" if more else first
