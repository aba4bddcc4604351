"""The parameters of a picture: who asks for what, who wins, and what is allowed.

Every value that reaches the device has passed ``settle``. This module knows no model: what one model
cannot do (a size its decoder cannot make, a scheduler of another family) is the engine's to refuse.
"""

from __future__ import annotations

import difflib
import math
import unicodedata
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from text2img.errors import ErrorCode, PromptFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SCHEDULERS: Final = ("dpm++", "euler", "euler-a", "ddim", "unipc", "pndm", "heun", "lcm")
POSITIONS: Final = ("bottom-right", "bottom-left")
FORMATS: Final = ("png", "jpeg", "webp")
LONGEST_TEXT: Final = 20_000
"""Characters: some 100 times what CLIP reads at once; beyond that a text is a mistake."""
LONGEST_NAME: Final = 200
"""Characters of an artist's name."""
_STEERING: Final = "\u200c\u200d\u200e\u200f"
"""Joiners and direction marks, which names of some scripts need."""


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


def check_prompt_text(text: object) -> str:
    """The prompt's text; raises PromptFailed (``invalid_prompt``) where there is none that can be drawn."""
    if text is None:
        raise PromptFailed(ErrorCode.INVALID_PROMPT, "text is missing; write what the picture shall show")
    try:
        checked = check_text("text", text)
    except PromptFailed as exc:
        raise PromptFailed(ErrorCode.INVALID_PROMPT, str(exc)) from None
    if not checked.strip():
        raise PromptFailed(ErrorCode.INVALID_PROMPT, "text is empty; write what the picture shall show")
    return checked


def check_text(name: str, value: object) -> str:
    """A string that a tokenizer can read: no NUL, no lone surrogate, not endless."""
    if type(value) is not str:  # BSON's JavaScript is a kind of str, and no text
        raise _wrong(name, value, "must be text")
    if len(value) > LONGEST_TEXT:
        raise _too_long(name, len(value), LONGEST_TEXT)
    if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value):
        raise PromptFailed(
            ErrorCode.INVALID_PARAMETERS, f"{name} holds a NUL or half a surrogate pair; write plain Unicode"
        )
    return value


def check_name(name: str, value: object) -> str:
    """A line of at most LONGEST_NAME characters, without the blanks around it; empty where it is blank."""
    line = check_text(name, value)
    for char in line:
        if unicodedata.category(char) in {"Cc", "Cf", "Zl", "Zp"} and char not in _STEERING:
            raise PromptFailed(
                ErrorCode.INVALID_PARAMETERS,
                f"{name} holds the control character U+{ord(char):04X}; write it in one line of plain text",
            )
    if len(line) > LONGEST_NAME:
        raise _too_long(name, len(line), LONGEST_NAME)
    return line.strip()


def check_integer(name: str, value: object, low: int, high: int) -> int:
    """An integer in [low, high]; 30.0 passes, since JavaScript shells store every number as a double."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise _wrong(name, value, "must be a whole number")
    if not low <= value <= high:
        raise _wrong(name, value, f"must be between {low} and {high}")
    return int(value)


def check_number(name: str, value: object, low: float, high: float) -> float:
    """A finite number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(name, value, "must be a number")
    if not math.isfinite(value) or not low <= value <= high:
        raise _wrong(name, value, f"must be a finite number between {low} and {high}")
    return float(value)


def check_pixels(name: str, value: object) -> int:
    """A width or height in pixels: in [64, 4096] and a multiple of 8."""
    pixels = check_integer(name, value, 64, 4096)
    if pixels % 8:
        raise _wrong(
            name, value, f"must be a multiple of 8; {pixels // 8 * 8} or {pixels // 8 * 8 + 8} would do"
        )
    return pixels


def check_scheduler(value: object) -> str:
    """One of SCHEDULERS."""
    return check_word("scheduler", value, SCHEDULERS)


def check_word(name: str, value: object, known: Sequence[str]) -> str:
    """One of the known words."""
    if not isinstance(value, str) or value not in known:
        raise _wrong(name, value, f"must be one of {', '.join(known)}{nearest(str(value), known)}")
    return value


STYLE_CHECKS: Final[dict[str, Callable[[str, object], object]]] = {
    "artist_name": check_name,
    "signature_position": lambda name, value: check_word(name, value, POSITIONS),
    "signature_opacity": lambda name, value: check_integer(name, value, 0, 255),
    "image_format": lambda name, value: check_word(name, value, FORMATS),
    "image_quality": lambda name, value: check_integer(name, value, 1, 100),
}
"""How each wish about what is done to the pixels, once they are made, is checked."""


def nearest(word: str, known: Sequence[str]) -> str:
    """``"; did you mean …?"`` where one of the known words is close, else nothing."""
    close = difflib.get_close_matches(word[:100], known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _first(wishes: Sequence[Wishes], name: str) -> object:
    asked = (getattr(wish, name) for wish in wishes)
    return next((value for value in asked if value is not None), None)


def _too_long(name: str, length: int, most: int) -> PromptFailed:
    rule = f"{name} must not be longer than {most:,} characters"
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, f"{rule}; it has {length:,}")


def _wrong(name: str, value: object, rule: str) -> PromptFailed:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}…"
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, f"{name} {rule}; it is {shown}")
