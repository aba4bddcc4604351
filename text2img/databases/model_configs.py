"""Model configurations, for every adapter: a document's fields, checked, since they are the job's own.

Knows no database: where the document stands, and how its id is kept, is the adapter's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from text2img.errors import ConfigurationError, PromptFailed
from text2img.prompts import ModelConfiguration, Wishes
from text2img.prompts.loras import check_loras
from text2img.prompts.parameters import STYLE_CHECKS, check_aspect_ratio, check_num_images, check_scheduler
from text2img.prompts.validation import check_integer, check_number, check_pixels, check_text, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from text2img.prompts import PromptId

MODEL_TYPE: Final = "stable_diffusion"
_CHECKS: Final[dict[str, Callable[[str, object], object]]] = {
    "model_path": check_text,
    "revision": check_text,
    "variant": check_text,
    "negative_prompt": check_text,
    "scheduler": lambda _, value: check_scheduler(value),
    "num_inference_steps": lambda name, value: check_integer(name, value, 1, 1000),
    "guidance_scale": lambda name, value: check_number(name, value, 0, 100),
    "width": check_pixels,
    "height": check_pixels,
    "aspect_ratio": check_aspect_ratio,
    "num_images": check_num_images,
    "lora": lambda _, value: check_loras(value),
    "feature_cache": lambda name, value: check_integer(name, value, 0, 1000),
    "autoencoder": check_text,
    **STYLE_CHECKS,
}


def configuration_of(config_id: PromptId, fields: Mapping[str, object]) -> ModelConfiguration:
    """The model configuration; raises ConfigurationError that names the first field that is wrong."""
    given = {name: value for name, value in fields.items() if value is not None and name != "_id"}
    text = str(config_id)
    where = f"model configuration {text if text.isprintable() and len(text) <= 60 else _short(text)}"
    kind = given.pop("model_type", MODEL_TYPE)
    if kind != MODEL_TYPE:
        raise ConfigurationError(f"{where}: model_type must be {MODEL_TYPE}; it is {_short(kind)}")
    safety = given.pop("safety_checker", True)
    if not isinstance(safety, bool):
        raise ConfigurationError(f"{where}: safety_checker must be true or false; it is {_short(safety)}")
    checked = {name: _checked(where, name, value) for name, value in given.items()}
    return ModelConfiguration(
        model_path=_text(checked, "model_path"),
        revision=_text(checked, "revision"),
        variant=_text(checked, "variant"),
        safety_checker=safety,
        feature_cache=cast("int | None", checked.get("feature_cache")),
        autoencoder=_text(checked, "autoencoder"),
        wishes=Wishes.of(checked),
        id=config_id,
    )


def missing_configuration(config_id: str, collection: str) -> ConfigurationError:
    """What to say of a configuration that somebody asked for and that is not there."""
    return ConfigurationError(
        f"{collection} holds no model configuration with the _id {_short(config_id)}; check --model-config-id"
    )


def _checked(where: str, name: str, value: object) -> object:
    check = _CHECKS.get(name)
    if check is None:
        hint = nearest(name, (*_CHECKS, "safety_checker", "model_type"))
        raise ConfigurationError(f"{where}: {_short(name)} is no field of a model configuration{hint}")
    try:
        return check(name, value)
    except PromptFailed as exc:
        raise ConfigurationError(f"{where}: {exc}") from None


def _text(checked: Mapping[str, object], name: str) -> str | None:
    value = checked.get(name)
    return None if value is None else str(value)


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}…"
