"""The parameters of a picture: who asks for what, who wins, and what is allowed.

Every value that reaches the device has passed ``settle``. This module knows no model: what one model
cannot do (a size its decoder cannot make, a scheduler of another family) is the engine's to refuse.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from text2img.prompts.checks import (
    check_integer,
    check_name,
    check_number,
    check_pixels,
    check_text,
    check_word,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SCHEDULERS: Final = ("dpm++", "euler", "euler-a", "ddim", "unipc", "pndm", "heun", "lcm")
POSITIONS: Final = ("bottom-right", "bottom-left")
FORMATS: Final = ("png", "jpeg", "webp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """Parameters as somebody asked for them, unchecked; ``None`` asks for nothing.

    A prompt's own fields, the flags, the model configuration and the defaults are each such a set.
    """

    negative_prompt: object = None
    seed: object = None
    num_inference_steps: object = None
    guidance_scale: object = None
    width: object = None
    height: object = None
    scheduler: object = None
    artist_name: object = None
    signature_position: object = None
    signature_opacity: object = None
    image_format: object = None
    image_quality: object = None

    @classmethod
    def of(cls, document: Mapping[str, object]) -> Wishes:
        """The wishes among a document's fields; other fields are left alone."""
        return cls(**{name: document.get(name) for name in PARAMETER_NAMES})


PARAMETER_NAMES: Final = tuple(field.name for field in fields(Wishes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Checked parameters of one picture. ``scheduler`` None is the model's own; without ``artist_name`` the
    picture is not signed; where one of those below it is None, the encoder does as it usually does.

    Ranges: seed [0, 2⁶³), steps [1, 1000], guidance [0, 100], width and height in pixels [64, 4096] and
    multiples of 8, opacity [0, 255], quality [1, 100].
    """

    negative_prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    width: int
    height: int
    scheduler: str | None
    artist_name: str | None = None
    signature_position: str | None = None
    signature_opacity: int | None = None
    image_format: str | None = None
    image_quality: int | None = None


def settle(wishes: Sequence[Wishes], *, seed: int) -> Parameters:
    """The parameters that win, the most specific wishes first; ``seed`` is taken where nobody wished one.

    Raises PromptFailed (``invalid_parameters``) with a sentence that names the first field that is wrong.
    The last of the wishes must leave nothing open but the seed, the texts, the scheduler, and how the picture
    is signed and written.
    """
    won = {name: _first(wishes, name) for name in PARAMETER_NAMES}
    scheduler, negative = won["scheduler"], won["negative_prompt"]
    return Parameters(
        negative_prompt="" if negative is None else check_text("negative_prompt", negative),
        seed=seed if won["seed"] is None else check_integer("seed", won["seed"], 0, 2**63 - 1),
        num_inference_steps=check_integer("num_inference_steps", won["num_inference_steps"], 1, 1000),
        guidance_scale=check_number("guidance_scale", won["guidance_scale"], 0, 100),
        width=check_pixels("width", won["width"]),
        height=check_pixels("height", won["height"]),
        scheduler=None if scheduler is None else check_scheduler(scheduler),
        **_style(won),
    )


def _style(won: Mapping[str, object]) -> dict[str, Any]:
    """What is done to the pixels; nothing of a signature where there is no name, or a blank one."""
    style = {
        name: None if won[name] is None else check(name, won[name]) for name, check in STYLE_CHECKS.items()
    }
    unsigned = () if style["artist_name"] else ("artist_name", "signature_position", "signature_opacity")
    return {**style, **dict.fromkeys(unsigned)}


def check_scheduler(value: object) -> str:
    """One of SCHEDULERS."""
    return check_word("scheduler", value, SCHEDULERS)


STYLE_CHECKS: Final[dict[str, Callable[[str, object], object]]] = {
    "artist_name": check_name,
    "signature_position": lambda name, value: check_word(name, value, POSITIONS),
    "signature_opacity": lambda name, value: check_integer(name, value, 0, 255),
    "image_format": lambda name, value: check_word(name, value, FORMATS),
    "image_quality": lambda name, value: check_integer(name, value, 1, 100),
}
"""How each wish about what is done to the pixels, once they are made, is checked."""


def _first(wishes: Sequence[Wishes], name: str) -> object:
    asked = (getattr(wish, name) for wish in wishes)
    return next((value for value in asked if value is not None), None)
