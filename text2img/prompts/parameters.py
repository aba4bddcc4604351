"""Parameters of a prompt: requested, validated and resolved, with LoRAs, image sizes and aspect ratios.

Each check of a value returns it normalised, or raises PromptFailed with a message that begins with the
field's name. A LoRA is only a path and a weight here; nothing is fetched or read.
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts.quoting import quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


MAX_TEXT_CHARS: Final = 20_000
"""Characters: about 100 times what CLIP reads at once; a longer text is a mistake."""
MAX_NAME_CHARS: Final = 200
"""Characters of an artist's name."""
_UNREADABLE: Final = re.compile("[\0\ud800-\udfff]")
_ALLOWED_FORMAT_CHARS: Final = "\u200c\u200d\u200e\u200f"
"""Joiners and direction marks, which names in some scripts need."""
_INVISIBLE: Final = frozenset(("Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Mc", "Me"))
_FILLERS: Final = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters and a symbol that are blank: the fillers of Hangul, and Braille's blank."""


def check_prompt_text(text: object, tags: object = None) -> str:
    """Return the prompt's text or, if it has none, its tags (a list of texts) joined by spaces.

    Raises PromptFailed (``invalid_prompt``) if neither is valid.
    """
    if text is None and tags is None:
        raise PromptFailed(ErrorCode.INVALID_PROMPT, "text is missing; describe the image")
    name = "text" if text is not None else "prompt_tags"
    try:
        checked = check_text(name, _joined(tags) if text is None else text)
    except PromptFailed as exc:
        raise PromptFailed(ErrorCode.INVALID_PROMPT, str(exc)) from None
    if all(map(is_invisible, checked)):
        reason = ": it has only invisible characters" if checked.strip() else ""
        raise PromptFailed(ErrorCode.INVALID_PROMPT, f"{name} is empty{reason}; describe the image")
    return checked


def is_invisible(char: str) -> bool:
    """Return True for white space, and for a character that shows nothing by itself (marks combine)."""
    return unicodedata.category(char) in _INVISIBLE or char in _FILLERS


def _joined(tags: object) -> str:
    if not isinstance(tags, list | tuple):
        raise invalid_value("prompt_tags", tags, "must be a list of texts")
    length = max(len(tags) - 1, 0)  # of the blanks between them
    for tag in tags:
        if type(tag) is not str:
            raise invalid_value("prompt_tags", tag, "must contain only texts")
        length += len(tag)
    if length > MAX_TEXT_CHARS:  # counted, not joined: a file can repeat a long tag by a few characters
        raise too_long_error("prompt_tags", length, MAX_TEXT_CHARS)
    return " ".join(tags)


def check_text(name: str, value: object) -> str:
    """Return a text that a tokenizer can read: no NUL, no lone surrogate, at most MAX_TEXT_CHARS long."""
    if type(value) is not str:  # BSON's Code is a subclass of str, but not text
        raise invalid_value(name, value, "must be text")
    if len(value) > MAX_TEXT_CHARS:
        raise too_long_error(name, len(value), MAX_TEXT_CHARS)
    if _UNREADABLE.search(value):
        raise PromptFailed(
            ErrorCode.INVALID_PARAMETERS, f"{name} contains a NUL or a lone surrogate; write plain Unicode"
        )
    return value


def check_name(name: str, value: object) -> str:
    """Return one line of at most MAX_NAME_CHARS characters, with the blanks around it removed."""
    line = check_text(name, value)
    for char in line:
        if is_control_character(char):
            raise PromptFailed(
                ErrorCode.INVALID_PARAMETERS,
                f"{name} contains the control character U+{ord(char):04X}; write one line of plain text",
            )
    if len(line) > MAX_NAME_CHARS:
        raise too_long_error(name, len(line), MAX_NAME_CHARS)
    return line.strip()


def is_control_character(char: str) -> bool:
    """Return True for an invisible character that affects others (breaks a line, hides) and no name needs."""
    return unicodedata.category(char) in {"Cc", "Cf", "Zl", "Zp"} and char not in _ALLOWED_FORMAT_CHARS


def check_integer(name: str, value: object, low: int, high: int) -> int:
    """Return an integer in [low, high]; 30.0 passes, since JavaScript shells store numbers as doubles."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise invalid_value(name, value, "must be a whole number")
    if not low <= value <= high:
        raise invalid_value(name, value, f"must be between {low} and {high}")
    return int(value)


def check_number(name: str, value: object, low: float, high: float) -> float:
    """Return a finite number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid_value(name, value, "must be a number")
    if not low <= value <= high:  # False for NaN, and exact for integers that no float can hold
        raise invalid_value(name, value, f"must be a finite number between {low} and {high}")
    return float(value)


def check_pixels(name: str, value: object) -> int:
    """Return a width or height in pixels: in [64, 4096] and a multiple of 8."""
    pixels = check_integer(name, value, 64, 4096)
    if pixels % 8:
        raise invalid_value(
            name, value, f"must be a multiple of 8, such as {pixels // 8 * 8} or {pixels // 8 * 8 + 8}"
        )
    return pixels


def check_word(name: str, value: object, known: Sequence[str]) -> str:
    """Return the value if it is one of the known words."""
    if not isinstance(value, str) or value not in known:
        hint = nearest(value, known) if isinstance(value, str) else ""
        raise invalid_value(name, value, f"must be one of {', '.join(known)}{hint}")
    return value


def nearest(word: str, known: Sequence[str]) -> str:
    """Return ``"; did you mean …?"`` if one of the known words is similar, else an empty text."""
    close = difflib.get_close_matches(word[:100], known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def too_long_error(name: str, length: int, max_length: int) -> PromptFailed:
    """Return the error for a text that is too long."""
    rule = f"{name} must not be longer than {max_length:,} characters"
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, f"{rule}; it has {length:,}")


def invalid_value(name: str, value: object, rule: str) -> PromptFailed:
    """Return the error for a value that breaks the rule; the message quotes at most 60 characters of it."""
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, f"{name} {rule}; it is {quoted(value)}")


MAX_LORAS: Final = 8
"""LoRAs of one image."""
MAX_PATH_CHARS: Final = 2_000
"""Characters; signed URLs are long."""
MAX_WEIGHT: Final = 10.0
_KEYS: Final = ("path", "weight", "sha256", "size")
_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}")
_MAX_FILE_BYTES: Final = 2**40


@dataclass(frozen=True, slots=True)
class Lora:
    """One LoRA: its path as its owner wrote it, including secrets in a URL, and its weight in [−10, 10].

    ``sha256`` (64 lower-case hexadecimal digits) and ``size`` (bytes) are those that its file must have, if
    the owner gives them.
    """

    path: str
    weight: float
    sha256: str | None = None
    size: int | None = None

    @property
    def shown(self) -> str:
        """The path without a URL's user, query and fragment, which may contain secrets."""
        scheme, separator, rest = self.path.partition("://")
        if not separator:
            return self.path
        authority, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
        return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"

    @property
    def document(self) -> dict[str, object]:
        """The document to record, without secrets."""
        return {"path": self.shown, "weight": self.weight}


def check_loras(value: object) -> tuple[Lora, ...]:
    """Return the LoRAs of a document's ``lora``: one mapping, or a list of at most MAX_LORAS, maybe empty.

    Raises PromptFailed (``invalid_parameters``) with a message that never contains a path.
    """
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, list | tuple):
        raise _refused('lora must be {"path": …, "weight": …} or a list of them')
    if len(entries) > MAX_LORAS:
        raise _refused(f"lora must not name more than {MAX_LORAS}; it names {len(entries)}")
    loras = tuple(_checked(f"lora {number}:", entry) for number, entry in enumerate(entries, 1))
    if len({lora.path for lora in loras}) < len(loras):
        raise _refused("lora names the same path twice; give it once, with one weight")
    return loras


def _checked(which: str, entry: object) -> Lora:
    if isinstance(entry, Lora):  # from a model configuration, which was validated when it was read
        return entry
    if not isinstance(entry, Mapping):
        raise _refused(f'{which} must be {{"path": …, "weight": …}}')
    if unknown := [key for key in entry if key not in _KEYS]:
        raise _refused(f"{which} has the unknown field {quoted(unknown[0])}; it takes {', '.join(_KEYS)}")
    return Lora(
        path=_path(which, entry.get("path")),
        weight=_weight(which, entry.get("weight")),
        sha256=_sha256(which, entry.get("sha256")),
        size=_size(which, entry.get("size")),
    )


def _path(which: str, value: object) -> str:
    if type(value) is not str or not value.strip():
        raise _refused(f"{which} path is missing; give the LoRA's path or URL")
    if len(value) > MAX_PATH_CHARS:
        raise _refused(f"{which} path must not be longer than {MAX_PATH_CHARS:,} characters")
    if any(char < " " or char == "\x7f" or "\ud800" <= char <= "\udfff" for char in value):
        raise _refused(f"{which} path contains a control character or a lone surrogate")
    return value


def _weight(which: str, value: object) -> float:
    if value is None:
        return 1.0
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -MAX_WEIGHT <= value <= MAX_WEIGHT:  # type: ignore[operator]
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
    if not number or not 1 <= value <= _MAX_FILE_BYTES or value != value // 1:  # type: ignore[operator]
        raise _refused(f"{which} size must be a whole number of bytes")
    return int(value)


def _refused(message: str) -> PromptFailed:
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, message)


SCHEDULERS: Final = ("dpm++", "euler", "euler-a", "ddim", "unipc", "pndm", "heun", "lcm")
POSITIONS: Final = ("bottom-right", "bottom-left")
FORMATS: Final = ("png", "jpeg", "webp")
MAX_SEED: Final = 2**63 - 1
MAX_IMAGES: Final = 100
"""Images of one prompt, which are made under one claim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Validated parameters of one image.

    ``scheduler`` None means the model's own, ``guidance_scale`` None that the model takes none. Without
    ``artist_name`` the image is not signed. None in a field below it means the encoder's default.
    ``aspect_ratio`` is the one from which the size was computed, if any.

    Ranges: seed [0, 2⁶³), steps [1, 1000], guidance [0, 100], width and height in pixels [64, 4096] and
    multiples of 8, opacity [0, 255], quality [1, 100], num_images [1, MAX_IMAGES].
    """

    negative_prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float | None
    width: int
    height: int
    scheduler: str | None
    true_cfg_scale: float | None = None
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
        """The parameters to record, by name, without secrets in LoRA URLs.

        Those that are empty are left out, except a guidance that the model does not take.
        """
        values = {name: getattr(self, name) for name in RECORDED_NAMES}
        values["loras"] = [lora.document for lora in self.loras] or None
        values["num_images"] = self.num_images if self.num_images > 1 else None
        return {
            name: value for name, value in values.items() if value is not None or name == "guidance_scale"
        }


RECORDED_NAMES: Final = tuple(field.name for field in fields(Parameters))


def resolve_parameters(
    requested: Sequence[RequestedParameters], *, seed: int, multiple: int = 8
) -> Parameters:
    """Return the parameters; in ``requested`` the most specific set comes first and wins.

    ``seed`` is used if none is requested. The last set must be complete except for the seed, the texts, the
    scheduler, and the signature and file format; its width and height are the model's own. A width or height
    computed from an aspect ratio is a multiple of ``multiple``. Raises PromptFailed (``invalid_parameters``)
    with a message that names the first invalid field.
    """
    chosen = {name: _first(requested, name) for name in PARAMETER_NAMES}
    scheduler, negative, images = chosen["scheduler"], chosen["negative_prompt"], chosen["num_images"]
    images = 1 if images is None else check_num_images("num_images", images)
    true_cfg, (width, height, ratio) = chosen["true_cfg_scale"], resolve_size(requested, multiple)
    return Parameters(
        negative_prompt="" if negative is None else check_text("negative_prompt", negative),
        seed=seed if chosen["seed"] is None else _seed(chosen["seed"], images),
        num_inference_steps=check_integer("num_inference_steps", chosen["num_inference_steps"], 1, 1000),
        guidance_scale=check_number("guidance_scale", chosen["guidance_scale"], 0, 100),
        true_cfg_scale=None if true_cfg is None else check_number("true_cfg_scale", true_cfg, 0, 100),
        width=width,
        height=height,
        aspect_ratio=ratio,
        num_images=images,
        loras=() if chosen["lora"] is None else check_loras(chosen["lora"]),
        scheduler=None if scheduler is None else check_scheduler(scheduler),
        **_style(chosen),
    )


def _seed(value: object, images: int) -> int:
    """Return the seed if the seeds of all images, which count up from it, are valid too."""
    if value == -1 and not isinstance(value, bool):
        raise invalid_value("seed", value, "must not be negative: leave it out for a seed made from the id")
    seed = check_integer("seed", value, 0, MAX_SEED)
    if seed + images - 1 > MAX_SEED:
        raise invalid_value("seed", value, f"must leave room below 2⁶³ for the seeds of {images} images")
    return seed


def _style(chosen: Mapping[str, object]) -> dict[str, Any]:
    """Return the signature and file format; no signature if the name is missing or blank."""
    style = {
        name: None if chosen[name] is None else check(name, chosen[name])
        for name, check in STYLE_CHECKS.items()
    }
    unsigned = () if style["artist_name"] else ("artist_name", "signature_position", "signature_opacity")
    return {**style, **dict.fromkeys(unsigned)}


def check_num_images(name: str, value: object) -> int:
    """Return the number of images of a prompt, in [1, MAX_IMAGES]."""
    return check_integer(name, value, 1, MAX_IMAGES)


def check_scheduler(value: object) -> str:
    """Return the value if it is one of SCHEDULERS."""
    return check_word("scheduler", value, SCHEDULERS)


STYLE_CHECKS: Final[dict[str, Callable[[str, object], object]]] = {
    "artist_name": check_name,
    "signature_position": lambda name, value: check_word(name, value, POSITIONS),
    "signature_opacity": lambda name, value: check_integer(name, value, 0, 255),
    "image_format": lambda name, value: check_word(name, value, FORMATS),
    "image_quality": lambda name, value: check_integer(name, value, 1, 100),
}
"""The checks of the parameters for the signature and the file format, by name."""


def _first(requested: Sequence[RequestedParameters], name: str) -> object:
    for source in requested:  # a loop: a million prompts are checked here, each field twice
        value = getattr(source, name)
        if value is not None:
            return value
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedParameters:
    """Parameters as requested, not validated; ``None`` means not requested.

    A prompt's own fields, the flags, the model configuration and the defaults are each such a set.
    """

    negative_prompt: object = None
    seed: object = None
    num_inference_steps: object = None
    guidance_scale: object = None
    true_cfg_scale: object = None
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
        """Return the parameters among a document's fields; other fields are ignored."""
        return cls(**{name: document.get(name) for name in PARAMETER_NAMES})


PARAMETER_NAMES: Final = tuple(field.name for field in fields(RequestedParameters))


SIDES: Final = {"1:1": (1.0, 1.0), "2:2": (1.5, 1.5), "1:2": (1.0, 2.0)}
"""The ratios that mean a size: width and height in sides of the model's own square. If that is 512×512, they
are 512×512, 768×768 and 512×1024."""
ASPECT_RATIOS: Final = (*SIDES, "2:1", "3:2", "2:3", "4:3", "3:4", "16:9", "9:16")
"""The others result in as many pixels as the model's own size, within rounding."""


def resolve_size(requested: Sequence[RequestedParameters], multiple: int) -> tuple[int, int, str | None]:
    """Return width and height in pixels, and the aspect ratio if either was computed from one.

    Each set of ``requested``, the most specific first, fills in what is still open: first by its width and
    height, then by its aspect ratio. The last set is the model's own size and is complete. An aspect ratio
    keeps a side that is already set. Raises PromptFailed (``invalid_parameters``).
    """
    own = check_pixels("width", requested[-1].width), check_pixels("height", requested[-1].height)
    width: int | None = None
    height: int | None = None
    used_ratio = None
    for source in requested:
        if width is None and source.width is not None:
            width = check_pixels("width", source.width)
        if height is None and source.height is not None:
            height = check_pixels("height", source.height)
        ratio = source.aspect_ratio
        ratio = None if ratio is None else check_aspect_ratio("aspect_ratio", ratio)
        if ratio is not None and (width is None or height is None):
            width, height = _size_of_ratio(ratio, (width, height), own, multiple)
            used_ratio = ratio
        if width is not None and height is not None:
            return check_pixels("width", width), check_pixels("height", height), used_ratio
    raise ValueError("the last requested parameters lack the size")


def check_aspect_ratio(name: str, value: object) -> str:
    """Return the value if it is one of ASPECT_RATIOS."""
    return check_word(name, value, ASPECT_RATIOS)


def _size_of_ratio(
    ratio: str, given: tuple[int | None, int | None], own: tuple[int, int], multiple: int
) -> tuple[int, int]:
    """Return width and height of that ratio, multiples of ``multiple``; a given side is kept."""
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
