"""The parameters of a picture: who asks for what, who wins, and what is allowed.

Every value that reaches the device has passed ``settle``. This module knows no model: what one model
cannot do (a size its decoder cannot make, a scheduler of another family) is the engine's to refuse.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from text2img.prompts.aspect_ratio import settle_size
from text2img.prompts.loras import check_loras
from text2img.prompts.requested import PARAMETER_NAMES, Wishes
from text2img.prompts.validation import check_integer, check_name, check_number, check_text, check_word, wrong

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from text2img.prompts.loras import Lora

SCHEDULERS: Final = ("dpm++", "euler", "euler-a", "ddim", "unipc", "pndm", "heun", "lcm")
POSITIONS: Final = ("bottom-right", "bottom-left")
FORMATS: Final = ("png", "jpeg", "webp")
LARGEST_SEED: Final = 2**63 - 1
MOST_IMAGES: Final = 100
"""Pictures of one prompt, which are made under one claim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Checked parameters of one picture. ``scheduler`` None is the model's own; without ``artist_name`` the
    picture is not signed; where one of those below it is None, the encoder does as it usually does.
    ``aspect_ratio`` is the one that decided on the size, if one did.

    Ranges: seed [0, 2⁶³), steps [1, 1000], guidance [0, 100], width and height in pixels [64, 4096] and
    multiples of 8, opacity [0, 255], quality [1, 100], num_images [1, MOST_IMAGES].
    """

    negative_prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    width: int
    height: int
    scheduler: str | None
    aspect_ratio: str | None = None
    num_images: int = 1
    loras: tuple[Lora, ...] = ()
    artist_name: str | None = None
    signature_position: str | None = None
    signature_opacity: int | None = None
    image_format: str | None = None
    image_quality: int | None = None

    @property
    def recorded(self) -> dict[str, object]:
        """Those that say anything, by name, as they may be written down: no secret of a LoRA's URL."""
        settled = {name: getattr(self, name) for name in RECORDED_NAMES}
        settled["loras"] = [lora.document for lora in self.loras] or None
        settled["num_images"] = self.num_images if self.num_images > 1 else None
        return {name: value for name, value in settled.items() if value is not None}


RECORDED_NAMES: Final = tuple(field.name for field in fields(Parameters))


def settle(wishes: Sequence[Wishes], *, seed: int, multiple: int = 8) -> Parameters:
    """The parameters that win, the most specific wishes first; ``seed`` is taken where nobody wished one.

    Raises PromptFailed (``invalid_parameters``) with a sentence that names the first field that is wrong.
    The last of the wishes must leave nothing open but the seed, the texts, the scheduler, and how the picture
    is signed and written; its width and height are the model's own. ``multiple``: of what a width or height
    that follows from an aspect ratio shall be a multiple.
    """
    won = {name: _first(wishes, name) for name in PARAMETER_NAMES}
    scheduler, negative, images = won["scheduler"], won["negative_prompt"], won["num_images"]
    images = 1 if images is None else check_num_images("num_images", images)
    width, height, ratio = settle_size(wishes, multiple)
    return Parameters(
        negative_prompt="" if negative is None else check_text("negative_prompt", negative),
        seed=seed if won["seed"] is None else _seed(won["seed"], images),
        num_inference_steps=check_integer("num_inference_steps", won["num_inference_steps"], 1, 1000),
        guidance_scale=check_number("guidance_scale", won["guidance_scale"], 0, 100),
        width=width,
        height=height,
        aspect_ratio=ratio,
        num_images=images,
        loras=() if won["lora"] is None else check_loras(won["lora"]),
        scheduler=None if scheduler is None else check_scheduler(scheduler),
        **_style(won),
    )


def _seed(value: object, images: int) -> int:
    """A seed such that the one of the last picture is a seed as well."""
    seed = check_integer("seed", value, 0, LARGEST_SEED)
    if seed + images - 1 > LARGEST_SEED:
        raise wrong("seed", value, f"must leave room below 2⁶³ for the seeds of {images} pictures")
    return seed


def _style(won: Mapping[str, object]) -> dict[str, Any]:
    """What is done to the pixels; nothing of a signature where there is no name, or a blank one."""
    style = {
        name: None if won[name] is None else check(name, won[name]) for name, check in STYLE_CHECKS.items()
    }
    unsigned = () if style["artist_name"] else ("artist_name", "signature_position", "signature_opacity")
    return {**style, **dict.fromkeys(unsigned)}


def check_num_images(name: str, value: object) -> int:
    """How many pictures a prompt may have."""
    return check_integer(name, value, 1, MOST_IMAGES)


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
