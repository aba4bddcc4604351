"""Inspection of a model before its weights are read: completeness, consistency, and what requests it can run.

Needs no torch for the pipelines in ``pipelines``; for others it imports diffusers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from text2img.engine import ModelInfo
from text2img.engine.devices import silence_libraries, suppress_warnings
from text2img.engine.model_folder import (
    CHECKER,
    Component,
    Kind,
    ModelFolder,
    check_whole,
    choose_variant,
    read_json,
    weight_files,
)
from text2img.engine.pipelines import Call, call_of, defaults_of, guidance_works, negative_above
from text2img.engine.schedulers import SHORT_NAMES, check_packages, fitting_names
from text2img.errors import ConfigurationError, ErrorCode, ModelFailed, ModelUnusable, PromptFailed
from text2img.prompts.parameters import RequestedParameters

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from text2img.prompts import Parameters, Request


_MAY_BE_NULL = {"StableDiffusion3PAGPipeline": ("text_encoder_3", "tokenizer_3")}
"""Components that a pipeline does without, though diffusers does not list them as optional."""
_LCM_STEPS = 50  # diffusers' default for LCMScheduler
_LATENT_SIDE = 128  # of models whose configuration has no size
_PRX_SIDE = 1024  # pixels, as in diffusers


def check_model(model: ModelFolder, variant: str | None) -> dict[str, str | None]:
    """Check all that can be checked without the weights' values; return each component's variant to load.

    Raises ModelFailed with the cause and what to do about it.
    """
    _check_pipeline(model)
    check_complete(model)
    check_agreement(model)
    check_vocabularies(model.components)
    variants: dict[str, str | None] = {}
    for name, component in model.components.items():
        if component.kind is not Kind.MODEL or component.file is not None:
            continue
        files = [file.name for file in component.folder.iterdir()]
        chosen = choose_variant(files, component.stem, variant, str(component.folder))
        for file in weight_files(component.folder, component.stem, chosen):
            check_whole(file)
        variants[name] = chosen
    return variants


def model_info(model: ModelFolder, name: str) -> ModelInfo:
    """Return the facts about the model, from its configurations alone."""
    call, configs = call_of(model.pipeline), model.configs
    scheduler = model.components.get("scheduler")
    class_name = scheduler.class_name if scheduler else "none"
    own_scheduler = SHORT_NAMES.get(class_name, class_name)
    names = name, str(model.flags.get("_name_or_path", ""))
    requested, source = defaults_of(names, model.pipeline, configs, model.flags)
    width, height = _native_size(model, call)
    if isinstance(requested.width, int) and isinstance(requested.height, int):
        width, height = requested.width, requested.height
    return ModelInfo(
        name=name,
        revision=model.revision,
        family=model.family.name,
        width=width,
        height=height,
        multiple=_multiple(model, call),
        scheduler=own_scheduler,
        schedulers=fitting_names(model.family.names, class_name, configs.get("scheduler", {})),
        max_side=_max_side(model),
        max_steps=_max_steps(model, own_scheduler),
        requested=dataclasses.replace(requested, width=None, height=None),
        defaults_from=source,
        guidance=guidance_works(model.pipeline, configs, model.flags),
        least_guidance=call.least_guidance,
        true_cfg=call.true_cfg,
        negative_above=negative_above(model.pipeline, call, configs),
        sizes=call.sizes,
        fixed_area=call.fixed_area,
    )


def _max_steps(model: ModelFolder, own_scheduler: str) -> dict[str, int]:
    """Return the maximum number of steps by scheduler.

    It is the number that the model was trained with; with LCM, the number that it was distilled from.
    """
    config = _config(model, "scheduler")
    max_steps = dict.fromkeys((own_scheduler, *model.family.names), config.get("num_train_timesteps"))
    if not model.family.flow:
        max_steps["lcm"] = config.get("original_inference_steps", _LCM_STEPS)
    return {name: steps for name, steps in max_steps.items() if isinstance(steps, int)}


def _max_side(model: ModelFolder) -> int | None:
    """Return the maximum of a side in pixels; None if the denoiser's position embedding sets no limit."""
    lengths = _config(model, "transformer").get("axes_lens")
    if model.pipeline.startswith("ZImage") and isinstance(lengths, list):
        return int(min(lengths[1:])) * _multiple(model, call_of(model.pipeline))
    size = _config(model, model.family.denoiser).get("pos_embed_max_size")
    return size * model.family.patch * _vae_factor(model) if isinstance(size, int) else None


def _check_pipeline(model: ModelFolder) -> None:
    """Raise ModelUnusable unless the pipeline generates images from text alone, with what is installed."""
    for package in call_of(model.pipeline).packages:
        if find_spec(package) is None:
            raise ModelUnusable(f"{model.pipeline} needs the Python package {package}; install it")
    if scheduler := model.components.get("scheduler"):
        check_packages(scheduler.class_name, scheduler.config)
    if model.pipeline == "QwenImagePipeline" and _config(model, "transformer").get("guidance_embeds"):
        raise ModelUnusable("a QwenImagePipeline that embeds its guidance is not supported; use Qwen-Image")


def check_complete(model: ModelFolder) -> None:
    """Raise ConfigurationError if the model lacks a component that its pipeline cannot do without.

    ``read_folder`` checks the families of the table.
    """
    if model.family.names:
        return
    with suppress_warnings():
        silence_libraries()
        import diffusers

        pipeline = getattr(diffusers, model.pipeline)
    required, _ = pipeline._get_signature_keys(pipeline)  # noqa: SLF001 - diffusers has no other list
    optional = {*pipeline._optional_components, *_MAY_BE_NULL.get(model.pipeline, ())}  # noqa: SLF001
    optional -= {"text_encoder", "tokenizer"}  # diffusers means calls with embeddings in place of a prompt
    missing = sorted(set(required) - optional - model.components.keys() - set(CHECKER))
    if missing:
        raise ConfigurationError(
            f"the model has no {' and no '.join(missing)}, which {model.pipeline} needs; add what is missing"
            " to the folder and to its model_index.json"
        )


def _native_size(model: ModelFolder, call: Call) -> tuple[int, int]:
    """Return width and height in pixels of the images that the model was trained on."""
    if call.size is not None:
        return call.size
    if model.pipeline.startswith("PRX"):
        size = model.flags.get("default_sample_size") or _PRX_SIDE
        return int(size), int(size)
    size = call.latent_side or _config(model, _denoiser(model)).get("sample_size") or _LATENT_SIDE
    height, width = size if isinstance(size, list) else (size, size)
    factor = _vae_factor(model)
    return int(width) * factor, int(height) * factor


def _denoiser(model: ModelFolder) -> str:
    return model.family.denoiser or ("unet" if "unet" in model.components else "transformer")


def _multiple(model: ModelFolder, call: Call) -> int:
    """Return what width and height must be multiples of: a latent pixel times a token's side, and 8."""
    patch = call.patch
    if model.pipeline.startswith("PRX"):
        patch = _config(model, "transformer").get("patch_size") or patch
    return math.lcm(8, call.multiple or _vae_factor(model) * patch)


def _vae_factor(model: ModelFolder) -> int:
    """Return the pixels per side of one latent pixel; 1 for a model without an autoencoder.

    Most autoencoders halve the image between their levels, of which each class has a list of its own.
    """
    name = next((name for name in ("vae", "movq", "vqvae", "vqgan") if name in model.components), None)
    if name is None:
        return 1
    config = _config(model, name)
    if isinstance(ratio := config.get("spatial_compression_ratio"), int):
        return ratio
    if isinstance(halvings := config.get("temperal_downsample"), list):
        return int(2 ** len(halvings))
    lists = ("block_out_channels", "decoder_block_out_channels", "encoder_block_out_channels", "dim_mult")
    levels = next((config[key] for key in lists if isinstance(config.get(key), list)), [0] * 4)
    return int(2 ** (len(levels) - 1))


def _config(model: ModelFolder, name: str) -> Mapping[str, Any]:
    component = model.components.get(name)
    return component.config if component else {}


Configs = dict[str, "Mapping[str, Any]"]


def check_agreement(model: ModelFolder) -> None:
    """Raise ModelFailed if the scheduler is of another family or two components' widths disagree."""
    family = model.family
    scheduler = model.components.get("scheduler")
    if scheduler and family.names and not family.runs_with(scheduler.class_name, dict(scheduler.config)):
        raise ModelUnusable(
            f"{model.pipeline} does not support the model's scheduler, {scheduler.class_name};"
            " fetch the model again"
        )
    configs: Configs = {name: component.config for name, component in model.components.items()}
    width_pairs = _WIDTH_PAIRS.get(family.name)
    for components, actual, expected in width_pairs(configs) if width_pairs else ():
        if actual is not None and expected is not None and actual != expected:
            raise ModelUnusable(
                f"the model's {components} do not match ({actual} and {expected}): they are from different"
                " models; fetch the model again"
            )


Pairs = list[tuple[str, object, object]]


def _sd_pairs(configs: Configs) -> Pairs:
    return [
        _cross_attention("unet and text_encoder", configs["unet"], _hidden_size(configs["text_encoder"])),
        *_latent_channels(configs, "unet", times=1),
    ]


def _sdxl_pairs(configs: Configs) -> Pairs:
    unet, second = configs["unet"], configs["text_encoder_2"]
    width = _sum_known(_hidden_size(configs["text_encoder"]), _hidden_size(second))
    time, pooled = unet.get("addition_time_embed_dim"), second.get("projection_dim")
    added = 6 * time + pooled if isinstance(time, int) and isinstance(pooled, int) else None
    return [
        _cross_attention("unet and text encoders", unet, width),
        ("unet and text_encoder_2's pooled text", unet.get("projection_class_embeddings_input_dim"), added),
        *_latent_channels(configs, "unet", times=1),
    ]


def _sd3_pairs(configs: Configs) -> Pairs:
    transformer = configs["transformer"]
    pooled = _sum_known(*(configs[name].get("projection_dim") for name in ("text_encoder", "text_encoder_2")))
    third = configs.get("text_encoder_3")
    return [
        ("transformer and pooled texts", transformer.get("pooled_projection_dim"), pooled),
        ("transformer and text_encoder_3", transformer.get("joint_attention_dim"), _hidden_size(third)),
        *_latent_channels(configs, "transformer", times=1),
    ]


def _flux_pairs(configs: Configs) -> Pairs:
    transformer = configs["transformer"]
    return [
        (
            "transformer and text_encoder",
            transformer.get("pooled_projection_dim"),
            _hidden_size(configs["text_encoder"]),
        ),
        (
            "transformer and text_encoder_2",
            transformer.get("joint_attention_dim"),
            _hidden_size(configs["text_encoder_2"]),
        ),
        *_latent_channels(configs, "transformer", times=4),
    ]


_WIDTH_PAIRS: dict[str, Callable[[Configs], Pairs]] = {
    "sd": _sd_pairs,
    "sdxl": _sdxl_pairs,
    "sd3": _sd3_pairs,
    "flux": _flux_pairs,
}


def _cross_attention(
    components: str, unet: Mapping[str, Any], width: int | None
) -> tuple[str, object, object]:
    """Return the text width that the UNet's attention expects, with the width that the encoders produce.

    A projection in the UNet (``encoder_hid_dim``) takes precedence. A list of widths, one per level, is
    compared only if all are equal.
    """
    if unet.get("encoder_hid_dim") is not None:
        return components, unet["encoder_hid_dim"], width
    expected = unet.get("cross_attention_dim")
    if isinstance(expected, list):
        expected = expected[0] if len(set(map(str, expected))) == 1 else None
    return components, expected, width


def _latent_channels(configs: Configs, denoiser: str, times: int) -> Pairs:
    """Return the channels that the denoiser expects, with those that the VAE produces.

    ``times`` is 4 where 2 × 2 latent pixels are packed into one.
    """
    latent = configs["vae"].get("latent_channels", 4)
    return [(f"{denoiser} and vae", configs[denoiser].get("in_channels"), latent * times)]


def _hidden_size(encoder: Mapping[str, Any] | None) -> int | None:
    if encoder is None:
        return None
    width = encoder.get("hidden_size", encoder.get("d_model"))
    return width if isinstance(width, int) else None


def _sum_known(*widths: int | None) -> int | None:
    known = [width for width in widths if isinstance(width, int)]
    return sum(known) if len(known) == len(widths) else None


def check_vocabularies(components: Mapping[str, Component]) -> None:
    """Check each tokenizer that has a text encoder of its number; raises ModelFailed."""
    for name, tokenizer in components.items():
        if tokenizer.kind is not Kind.TOKENIZER:
            continue
        size = vocabulary_size(tokenizer.folder)
        encoder = components.get(name.replace("tokenizer", "text_encoder"))
        embedded = encoder.config.get("vocab_size") if encoder else None
        if isinstance(embedded, int):
            check_size(name, size, embedded, exact=tokenizer.class_name.startswith("CLIP"))


def check_size(name: str, size: int, embedded: int, *, exact: bool) -> None:
    """Raise ModelFailed unless ``size`` tokens fit an embedding of ``embedded`` rows.

    CLIP's numbers are equal. T5's embedding is padded to a multiple of 128 (32,128 rows for 32,100 tokens).
    Other tokenizers may therefore have up to a fifth fewer tokens than rows, never more.
    """
    if size == embedded or (not exact and embedded * 0.8 <= size <= embedded):
        return
    raise ModelFailed(
        f"the model's {name} has {size:,} tokens and its text encoder {embedded:,}: they do not match;"
        " fetch the model again"
    )


def vocabulary_size(folder: Path) -> int:
    """Return the number of tokens in a tokenizer's folder, added ones included; ModelFailed if it has none.

    Supports ``tokenizer.json``, ``vocab.json`` with ``merges.txt``, BERT's ``vocab.txt``, and sentencepiece's
    models (T5's ``spiece.model``).
    """
    tokenizer_file = folder / "tokenizer.json"
    try:
        if tokenizer_file.is_file():
            tokens = _tokenizer_file_tokens(read_json(tokenizer_file))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokens = set(read_json(folder / "vocab.json"))
        elif (folder / "vocab.txt").is_file():
            tokens = set((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())
        else:
            return _sentencepiece_size(folder)
        return len(tokens | _added_tokens(folder))
    except (LookupError, TypeError, AttributeError) as exc:
        raise ModelFailed(f"the vocabulary in {folder} cannot be read; fetch the model again") from exc


def _tokenizer_file_tokens(content: dict[str, Any]) -> set[str]:
    vocab = content["model"]["vocab"]  # a dictionary of pieces, or with Unigram a list of (piece, score)
    pieces = vocab if isinstance(vocab, dict) else (piece for piece, _ in vocab)
    return {*pieces, *(token["content"] for token in content.get("added_tokens") or ())}


def _added_tokens(folder: Path) -> set[str]:
    """Return tokens that were added to a vocabulary afterwards; two files may list them."""
    decoder: dict[str, Any] = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file():
            content = read_json(file)
            decoder |= content if name == "added_tokens.json" else {}
            listed = content.get("added_tokens_decoder") or {}
            decoder |= {token["content"]: number for number, token in listed.items()}
    return set(decoder)


def _sentencepiece_size(folder: Path) -> int:
    """Return a sentencepiece vocabulary's size, with the 100 extra tokens that T5's tokenizer appends."""
    from sentencepiece import SentencePieceProcessor

    file = next(iter(sorted(folder.glob("*.model"))), None)
    if file is None:
        raise ModelFailed(
            f"{folder} has no vocabulary (tokenizer.json, vocab.json with merges.txt, or spiece.model);"
            " fetch the model again"
        )
    try:
        pieces = int(SentencePieceProcessor(model_file=str(file)).get_piece_size())
    except (RuntimeError, OSError) as exc:
        raise ModelFailed(f"{file} is not a sentencepiece vocabulary; fetch the model again") from exc
    return pieces + (_extra_ids(folder) if file.name == "spiece.model" else 0)


def _extra_ids(folder: Path) -> int:
    config = folder / "tokenizer_config.json"
    extra = json.loads(config.read_text(encoding="utf-8")).get("extra_ids", 100) if config.is_file() else 100
    return int(extra)


def check_fits(model: ModelInfo, parameters: Parameters) -> None:
    """Raise PromptFailed (``invalid_parameters``) for an unsupported size, scheduler or number of steps."""
    for name, pixels in (("width", parameters.width), ("height", parameters.height)):
        _check_side(name, pixels, model)
    _check_size(model, parameters.width, parameters.height)
    if parameters.scheduler is not None and parameters.scheduler not in model.schedulers:
        supported = (
            f"it supports {', '.join(model.schedulers)}" if model.schedulers else "it supports only its own"
        )
        raise _invalid(f"scheduler {parameters.scheduler} is not supported by this model; {supported}")
    max_steps = model.max_steps.get(parameters.scheduler or model.scheduler, 1000)
    if parameters.num_inference_steps > max_steps:
        raise _invalid(
            f"num_inference_steps must be at most {max_steps} with this scheduler; it is"
            f" {parameters.num_inference_steps}"
        )


def fit(model: ModelInfo, request: Request) -> Request:
    """Return the request as the model will be called: without guidance or negative prompt that do nothing.

    Raises PromptFailed (``invalid_parameters``) as ``check_fits`` does, and for what the prompt itself asks
    for and would have no effect; what the run or the model configuration asks for is left out.
    """
    check_fits(model, request.parameters)
    parameters, dropped = fit_parameters(model, request.parameters, request.prompt.requested)
    return dataclasses.replace(request, parameters=parameters, negative_left_out=dropped)


def fit_parameters(
    model: ModelInfo, parameters: Parameters, own: RequestedParameters | None = None
) -> tuple[Parameters, bool]:
    """Return the parameters of the model's call, and whether a negative prompt was left out; see ``fit``.

    ``own`` are those that the prompt itself asks for. A guidance of 1 or less asks for none.
    """
    own, guidance = own or RequestedParameters(), parameters.guidance_scale
    if not model.guidance:
        if own.guidance_scale is not None and guidance is not None and guidance > 1:
            raise _invalid("guidance_scale has no effect with this model, which takes none; leave it out")
        guidance = None
    elif guidance is not None and guidance < model.least_guidance:
        raise _invalid(f"guidance_scale must be at least {model.least_guidance:g} with this model")
    true_cfg = parameters.true_cfg_scale if model.true_cfg else None
    if true_cfg is None and own.true_cfg_scale is not None:
        raise _invalid(
            "true_cfg_scale is not a parameter of this model; give guidance_scale, or leave it out"
        )
    negative, works = parameters.negative_prompt, _negative_works(model, guidance) or (true_cfg or 0.0) > 1
    if negative and not works and own.negative_prompt:
        why = "with this model"
        if model.true_cfg:
            why = "without a true_cfg_scale above 1"
        elif model.negative_above is not None:
            why = f"with guidance_scale {guidance:g}; it needs more than {model.negative_above:g}"
        raise _invalid(f"negative_prompt has no effect {why}; leave it out")
    fitted = dataclasses.replace(
        parameters,
        guidance_scale=guidance,
        true_cfg_scale=true_cfg,
        negative_prompt=negative if works else "",
    )
    return fitted, bool(negative) and not works


def _negative_works(model: ModelInfo, guidance: float | None) -> bool:
    """Return True if a negative prompt changes the image."""
    return model.negative_above is not None and (guidance or 0.0) > model.negative_above


def _check_size(model: ModelInfo, width: int, height: int) -> None:
    """Raise PromptFailed for a size that the pipeline would replace by another one."""
    if model.sizes and (width, height) not in model.sizes:
        sizes = ", ".join(f"{one}×{other}" for one, other in model.sizes)
        raise _invalid(f"width and height must be one of {sizes} with this model; they are {width}×{height}")
    if (drawn := model.drawn_size(width, height)) != (width, height):
        raise _invalid(
            f"width and height must have about {model.width}×{model.height} pixels with this model; they"
            f" are {width}×{height}; use {drawn[0]}×{drawn[1]}"
        )


def _check_side(name: str, pixels: int, model: ModelInfo) -> None:
    multiple = model.multiple
    if pixels % multiple:
        below = pixels // multiple * multiple
        raise _invalid(
            f"{name} must be a multiple of {multiple} with this model; it is {pixels}; use {below} or"
            f" {below + multiple}"
        )
    if model.max_side is not None and pixels > model.max_side:
        raise _invalid(f"{name} must be at most {model.max_side} with this model; it is {pixels}")


def _invalid(message: str) -> PromptFailed:
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, message)
