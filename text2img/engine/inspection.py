"""What can be known of a model before its weights are read: whether it is whole, what it is, what it draws.

Needs no torch for the families in ``families``; other pipelines are looked up in diffusers.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from text2img.engine import ModelInfo
from text2img.engine.model_folder import (
    SHORT_NAMES,
    Component,
    Kind,
    ModelFolder,
    check_whole,
    choose_variant,
    read_json,
    weight_files,
)
from text2img.errors import ErrorCode, ModelFailed, PromptFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from text2img.prompts import Parameters


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


def model_info(model: ModelFolder, name: str) -> ModelInfo:
    """The model's card, from its configurations alone."""
    scheduler = model.components.get("scheduler")
    class_name = scheduler.class_name if scheduler else "none"
    own = SHORT_NAMES.get(class_name, class_name)
    width, height = _own_size(model)
    return ModelInfo(
        name=name,
        revision=model.revision,
        family=model.family.name,
        width=width,
        height=height,
        multiple=_multiple(model),
        scheduler=own,
        schedulers=model.family.names,
        max_side=_max_side(model),
        max_steps=_max_steps(model, own),
    )


def _max_steps(model: ModelFolder, own: str) -> dict[str, int]:
    """The most steps by scheduler: as many as it was trained with, LCM's as it was distilled from."""
    config = _config(model, "scheduler")
    ends = dict.fromkeys((own, *model.family.names), config.get("num_train_timesteps"))
    if not model.family.flow:
        ends["lcm"] = config.get("original_inference_steps", _LCM_STEPS)
    return {name: steps for name, steps in ends.items() if isinstance(steps, int)}


def _max_side(model: ModelFolder) -> int | None:
    """The most pixels a side can have, where the denoiser's positions end somewhere."""
    size = _config(model, model.family.denoiser).get("pos_embed_max_size")
    return size * model.family.patch * _vae_factor(model) if isinstance(size, int) else None


def _check_pipeline(model: ModelFolder) -> None:
    """The class must be one that draws from text alone, by the table or by diffusers' own list."""
    if model.family.names:
        return
    from text2img.engine.devices import silence_libraries, suppress_warnings

    with suppress_warnings():
        silence_libraries()
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


Configs = dict[str, "Mapping[str, Any]"]


def check_agreement(model: ModelFolder) -> None:
    """Raise ModelFailed where the scheduler is of another family or two components' widths disagree."""
    family = model.family
    scheduler = model.components.get("scheduler")
    if scheduler and family.names and not family.runs_with(scheduler.class_name, dict(scheduler.config)):
        raise ModelFailed(
            f"the model's scheduler, {scheduler.class_name}, is not of a kind that {model.pipeline} can use;"
            " fetch the model again"
        )
    configs: Configs = {name: part.config for name, part in model.components.items()}
    widths = _WIDTHS.get(family.name)
    for what, one, other in widths(configs) if widths else ():
        if one is not None and other is not None and one != other:
            raise ModelFailed(
                f"the model's {what} do not fit ({one} and {other}): they are of different models"
            )


Pairs = list[tuple[str, object, object]]


def _sd(configs: Configs) -> Pairs:
    return [
        _cross("unet and text_encoder", configs["unet"], _hidden(configs["text_encoder"])),
        *_latents(configs, "unet", times=1),
    ]


def _sdxl(configs: Configs) -> Pairs:
    unet, second = configs["unet"], configs["text_encoder_2"]
    width = _total(_hidden(configs["text_encoder"]), _hidden(second))
    time, pooled = unet.get("addition_time_embed_dim"), second.get("projection_dim")
    added = 6 * time + pooled if isinstance(time, int) and isinstance(pooled, int) else None
    return [
        _cross("unet and text encoders", unet, width),
        ("unet and text_encoder_2's pooled text", unet.get("projection_class_embeddings_input_dim"), added),
        *_latents(configs, "unet", times=1),
    ]


def _sd3(configs: Configs) -> Pairs:
    transformer = configs["transformer"]
    pooled = _total(*(configs[name].get("projection_dim") for name in ("text_encoder", "text_encoder_2")))
    third = configs.get("text_encoder_3")
    return [
        ("transformer and pooled texts", transformer.get("pooled_projection_dim"), pooled),
        ("transformer and text_encoder_3", transformer.get("joint_attention_dim"), _hidden(third)),
        *_latents(configs, "transformer", times=1),
    ]


def _flux(configs: Configs) -> Pairs:
    transformer = configs["transformer"]
    return [
        (
            "transformer and text_encoder",
            transformer.get("pooled_projection_dim"),
            _hidden(configs["text_encoder"]),
        ),
        (
            "transformer and text_encoder_2",
            transformer.get("joint_attention_dim"),
            _hidden(configs["text_encoder_2"]),
        ),
        *_latents(configs, "transformer", times=4),
    ]


_WIDTHS: dict[str, Callable[[Configs], Pairs]] = {"sd": _sd, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux}


def _cross(what: str, unet: Mapping[str, Any], width: int | None) -> tuple[str, object, object]:
    """The width of the text as the UNet's attention expects it, against what the encoders give.

    A projection in the UNet (``encoder_hid_dim``) comes first where there is one; a list of widths, one a
    level, must hold the same one throughout.
    """
    if unet.get("encoder_hid_dim") is not None:
        return what, unet["encoder_hid_dim"], width
    asked = unet.get("cross_attention_dim")
    if isinstance(asked, list):
        asked = asked[0] if len(set(map(str, asked))) == 1 else None
    return what, asked, width


def _latents(configs: Configs, denoiser: str, times: int) -> Pairs:
    """The channels that the denoiser takes and the VAE makes; ``times`` 4 where 2 × 2 are packed into one."""
    latent = configs["vae"].get("latent_channels", 4)
    return [(f"{denoiser} and vae", configs[denoiser].get("in_channels"), latent * times)]


def _hidden(encoder: Mapping[str, Any] | None) -> int | None:
    if encoder is None:
        return None
    width = encoder.get("hidden_size", encoder.get("d_model"))
    return width if isinstance(width, int) else None


def _total(*widths: int | None) -> int | None:
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
    """Whether ``size`` tokens fit an embedding of ``embedded`` rows.

    CLIP's agree exactly. T5's embedding is padded to a multiple of 128 (32,128 rows for 32,100 tokens), so
    that others may have up to a fifth fewer tokens than rows, never more.
    """
    if size == embedded or (not exact and embedded * 0.8 <= size <= embedded):
        return
    raise ModelFailed(
        f"the model's {name} knows {size:,} tokens and its text encoder {embedded:,}: they do not belong"
        " together; fetch the model again"
    )


def vocabulary_size(folder: Path) -> int:
    """The tokens that a tokenizer's folder knows, added ones included; ModelFailed where it has none.

    Knows ``tokenizer.json``, ``vocab.json`` with ``merges.txt``, BERT's ``vocab.txt``, and sentencepiece's
    models (T5's ``spiece.model``).
    """
    whole = folder / "tokenizer.json"
    try:
        if whole.is_file():
            tokens = _fast_tokens(read_json(whole))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokens = set(read_json(folder / "vocab.json"))
        elif (folder / "vocab.txt").is_file():
            tokens = set((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())
        else:
            return _pieces(folder)
        return len(tokens | _added(folder))
    except (LookupError, TypeError, AttributeError) as exc:
        raise ModelFailed(f"the vocabulary in {folder} cannot be read; fetch the model again") from exc


def _fast_tokens(content: dict[str, Any]) -> set[str]:
    vocab = content["model"]["vocab"]  # a dictionary of pieces, or with Unigram a list of (piece, score)
    pieces = vocab if isinstance(vocab, dict) else (piece for piece, _ in vocab)
    return {*pieces, *(token["content"] for token in content.get("added_tokens") or ())}


def _added(folder: Path) -> set[str]:
    """Tokens that were added to a vocabulary afterwards, which two files may name."""
    decoder: dict[str, Any] = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file():
            content = read_json(file)
            decoder |= content if name == "added_tokens.json" else {}
            listed = content.get("added_tokens_decoder") or {}
            decoder |= {token["content"]: number for number, token in listed.items()}
    return set(decoder)


def _pieces(folder: Path) -> int:
    """The size of a sentencepiece vocabulary, with the 100 extra tokens that T5's tokenizer appends."""
    from sentencepiece import SentencePieceProcessor

    file = next(iter(sorted(folder.glob("*.model"))), None)
    if file is None:
        raise ModelFailed(
            f"{folder} holds no vocabulary (tokenizer.json, vocab.json with merges.txt, or spiece.model);"
            " fetch the model again"
        )
    try:
        pieces = int(SentencePieceProcessor(model_file=str(file)).get_piece_size())
    except (RuntimeError, OSError) as exc:
        raise ModelFailed(f"{file} is no sentencepiece vocabulary; fetch the model again") from exc
    return pieces + (_extra_ids(folder) if file.name == "spiece.model" else 0)


def _extra_ids(folder: Path) -> int:
    config = folder / "tokenizer_config.json"
    extra = json.loads(config.read_text(encoding="utf-8")).get("extra_ids", 100) if config.is_file() else 100
    return int(extra)


def check_fits(model: ModelInfo, wanted: Parameters) -> None:
    """Raise PromptFailed (``invalid_parameters``) for a size, scheduler or number of steps it cannot do."""
    for name, pixels in (("width", wanted.width), ("height", wanted.height)):
        _check_side(name, pixels, model)
    if wanted.scheduler is not None and wanted.scheduler not in model.schedulers:
        known = f"it takes {', '.join(model.schedulers)}" if model.schedulers else "it takes only its own"
        raise _refused(f"scheduler {wanted.scheduler} does not fit this model; {known}")
    max_steps = model.max_steps.get(wanted.scheduler or model.scheduler, 1000)
    if wanted.num_inference_steps > max_steps:
        raise _refused(
            f"num_inference_steps must be at most {max_steps} with this scheduler; it is"
            f" {wanted.num_inference_steps}"
        )


def _check_side(name: str, pixels: int, model: ModelInfo) -> None:
    multiple = model.multiple
    if pixels % multiple:
        near = pixels // multiple * multiple
        raise _refused(
            f"{name} must be a multiple of {multiple} with this model; it is {pixels}, and {near} or"
            f" {near + multiple} would do"
        )
    if model.max_side is not None and pixels > model.max_side:
        raise _refused(f"{name} must be at most {model.max_side} with this model; it is {pixels}")


def _refused(message: str) -> PromptFailed:
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, message)
