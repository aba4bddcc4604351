"""Whether a model's components fit one another, as far as their configurations tell. No torch, no weights.

Widths that disagree fail in the first forward pass at best; a scheduler of another family draws noise
without a word. Both are found here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from text2img.errors import ModelFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from text2img.engine.model_folder import ModelFolder

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
