"""LoRAs as a prompt or a model configuration asks for them, checked.

Knows where one is said to be and how strongly it shall count; fetches and reads nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts.validation import (
    check_integer,
    check_name,
    check_number,
    check_pixels,
    check_text,
    check_word,
    invalid_value,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


MAX_LORAS: Final = 8
"""LoRAs of one picture."""
MAX_PATH_CHARS: Final = 2_000
"""Characters; signed URLs are long."""
MAX_WEIGHT: Final = 10.0
_KEYS: Final = ("path", "weight", "sha256", "size")
_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}")
_LARGEST: Final = 2**40


@dataclass(frozen=True, slots=True)
class Lora:
    """One LoRA: where it is (as its owner wrote it, secrets in the URL and all), and its weight in [−10, 10].

    ``sha256`` (64 hexadecimal digits, small letters) and ``size`` (bytes) are what its file must have, where
    the owner says.
    """

    path: str
    weight: float
    sha256: str | None = None
    size: int | None = None

    @property
    def shown(self) -> str:
        """The path as it may be written down: without a URL's user, query and fragment, where secrets are."""
        scheme, separator, rest = self.path.partition("://")
        if not separator:
            return self.path
        place, slash, name = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
        return f"{scheme}://{place.rpartition('@')[2]}{slash}{name}"

    @property
    def document(self) -> dict[str, object]:
        """What is recorded of it."""
        return {"path": self.shown, "weight": self.weight}


def check_loras(value: object) -> tuple[Lora, ...]:
    """The LoRAs of a document's ``lora``: one mapping, or a list of at most MOST, which may be empty.

    Raises PromptFailed (``invalid_parameters``) with a sentence that never repeats a path.
    """
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, list | tuple):
        raise _refused('lora must be {"path": …, "weight": …} or a list of such')
    if len(entries) > MAX_LORAS:
        raise _refused(f"lora must not name more than {MAX_LORAS}; it names {len(entries)}")
    loras = tuple(_checked(f"lora {number}:", entry) for number, entry in enumerate(entries, 1))
    if len({lora.path for lora in loras}) < len(loras):
        raise _refused("lora names the same path twice; give it once, with one weight")
    return loras


def _checked(which: str, entry: object) -> Lora:
    if isinstance(entry, Lora):  # of a model configuration, which was checked when it was read
        return entry
    if not isinstance(entry, Mapping):
        raise _refused(f'{which} must be {{"path": …, "weight": …}}')
    if unknown := [key for key in entry if key not in _KEYS]:
        raise _refused(f"{which} has the unknown field {str(unknown[0])[:40]!r}; it takes {', '.join(_KEYS)}")
    return Lora(
        path=_path(which, entry.get("path")),
        weight=_weight(which, entry.get("weight")),
        sha256=_sha256(which, entry.get("sha256")),
        size=_size(which, entry.get("size")),
    )


def _path(which: str, value: object) -> str:
    if type(value) is not str or not value.strip():
        raise _refused(f"{which} path is missing; say where the LoRA is")
    if len(value) > MAX_PATH_CHARS:
        raise _refused(f"{which} path must not be longer than {MAX_PATH_CHARS:,} characters")
    if any(char < " " or char == "\x7f" or "\ud800" <= char <= "\udfff" for char in value):
        raise _refused(f"{which} path holds a control character or half a surrogate pair")
    return value


def _weight(which: str, value: object) -> float:
    if value is None:
        return 1.0
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or abs(value) > MAX_WEIGHT:  # type: ignore[arg-type]
        raise _refused(f"{which} weight must be a finite number between {-MAX_WEIGHT:g} and {MAX_WEIGHT:g}")
    return float(value)  # type: ignore[arg-type]


def _sha256(which: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise _refused(f"{which} sha256 must be 64 hexadecimal digits")
    return value.lower()


def _size(which: str, value: object) -> int | None:
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 1 <= value <= _LARGEST or value != value // 1:  # type: ignore[operator]
        raise _refused(f"{which} size must be a whole number of bytes")
    return int(value)


def _refused(message: str) -> PromptFailed:
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, message)


SCHEDULERS: Final = ("dpm++", "euler", "euler-a", "ddim", "unipc", "pndm", "heun", "lcm")
POSITIONS: Final = ("bottom-right", "bottom-left")
FORMATS: Final = ("png", "jpeg", "webp")
MAX_SEED: Final = 2**63 - 1
MAX_IMAGES: Final = 100
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


def resolve_parameters(
    requested: Sequence[RequestedParameters], *, seed: int, multiple: int = 8
) -> Parameters:
    """The parameters that win, the most specific wishes first; ``seed`` is taken where nobody wished one.

    Raises PromptFailed (``invalid_parameters``) with a sentence that names the first field that is wrong.
    The last of the wishes must leave nothing open but the seed, the texts, the scheduler, and how the picture
    is signed and written; its width and height are the model's own. ``multiple``: of what a width or height
    that follows from an aspect ratio shall be a multiple.
    """
    won = {name: _first(requested, name) for name in PARAMETER_NAMES}
    scheduler, negative, images = won["scheduler"], won["negative_prompt"], won["num_images"]
    images = 1 if images is None else check_num_images("num_images", images)
    width, height, ratio = resolve_size(requested, multiple)
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
    seed = check_integer("seed", value, 0, MAX_SEED)
    if seed + images - 1 > MAX_SEED:
        raise invalid_value("seed", value, f"must leave room below 2⁶³ for the seeds of {images} pictures")
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
    return check_integer(name, value, 1, MAX_IMAGES)


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


def _first(requested: Sequence[RequestedParameters], name: str) -> object:
    asked = (getattr(wish, name) for wish in requested)
    return next((value for value in asked if value is not None), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedParameters:
    """Parameters as somebody asked for them, unchecked; ``None`` asks for nothing.

    A prompt's own fields, the flags, the model configuration and the defaults are each such a set.
    """

    negative_prompt: object = None
    seed: object = None
    num_inference_steps: object = None
    guidance_scale: object = None
    width: object = None
    height: object = None
    aspect_ratio: object = None
    num_images: object = None
    lora: object = None
    scheduler: object = None
    artist_name: object = None
    signature_position: object = None
    signature_opacity: object = None
    image_format: object = None
    image_quality: object = None

    @classmethod
    def of(cls, document: Mapping[str, object]) -> RequestedParameters:
        """The wishes among a document's fields; other fields are left alone."""
        return cls(**{name: document.get(name) for name in PARAMETER_NAMES})


PARAMETER_NAMES: Final = tuple(field.name for field in fields(RequestedParameters))


SIDES: Final = {"1:1": (1.0, 1.0), "2:2": (1.5, 1.5), "1:2": (1.0, 2.0)}
"""Those that mean a size: width and height in sides of the model's own square. Where that is 512×512 they are
512×512, 768×768 and 512×1024."""
ASPECT_RATIOS: Final = (*SIDES, "2:1", "3:2", "2:3", "4:3", "3:4", "16:9", "9:16")
"""All others have as many pixels as the model's own size, within rounding."""


def resolve_size(requested: Sequence[RequestedParameters], multiple: int) -> tuple[int, int, str | None]:
    """Width and height in pixels, and the aspect ratio, if one decided on any of the two.

    Of the wishes, the most specific first, each settles what those before it have left open: by its width and
    height, then by its aspect ratio. The last are the model's own size, in full. An aspect ratio that finds
    one side settled keeps to that side. Raises PromptFailed (``invalid_parameters``).
    """
    own = check_pixels("width", requested[-1].width), check_pixels("height", requested[-1].height)
    width: int | None = None
    height: int | None = None
    decided = None
    for wish in requested:
        if width is None and wish.width is not None:
            width = check_pixels("width", wish.width)
        if height is None and wish.height is not None:
            height = check_pixels("height", wish.height)
        ratio = None if wish.aspect_ratio is None else check_aspect_ratio("aspect_ratio", wish.aspect_ratio)
        if ratio is not None and (width is None or height is None):
            width, height = _sized(ratio, (width, height), own, multiple)
            decided = ratio
        if width is not None and height is not None:
            return check_pixels("width", width), check_pixels("height", height), decided
    raise ValueError("the last wishes leave the size open")


def check_aspect_ratio(name: str, value: object) -> str:
    """One of ASPECT_RATIOS."""
    return check_word(name, value, ASPECT_RATIOS)


def _sized(
    ratio: str, given: tuple[int | None, int | None], own: tuple[int, int], multiple: int
) -> tuple[int, int]:
    """Width and height of that ratio, multiples of ``multiple``; a side that is given stays as it is."""
    across, down = map(int, ratio.split(":"))
    width, height = given
    if width is not None:
        return width, _rounded(width * down / across, multiple)
    if height is not None:
        return _rounded(height * across / down, multiple), height
    side = math.sqrt(own[0] * own[1])
    if ratio in SIDES:
        wide, high = SIDES[ratio]
        return _rounded(side * wide, multiple), _rounded(side * high, multiple)
    stretch = math.sqrt(across / down)
    return _rounded(side * stretch, multiple), _rounded(side / stretch, multiple)


def _rounded(pixels: float, multiple: int) -> int:
    return max(1, math.floor(pixels / multiple + 0.5)) * multiple
