"""Validation of single values: text, names, numbers, pixels, and words from a list.

Each check returns the normalised value, or raises PromptFailed with a message that begins with the field's
name.
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from typing import TYPE_CHECKING, Final

from text2img.errors import ErrorCode, PromptFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_TEXT_CHARS: Final = 20_000
"""Characters: about 100 times what CLIP reads at once; a longer text is a mistake."""
MAX_NAME_CHARS: Final = 200
"""Characters of an artist's name."""
_UNREADABLE: Final = re.compile("[\0\ud800-\udfff]")
_ALLOWED_FORMAT_CHARS: Final = "\u200c\u200d\u200e\u200f"
"""Joiners and direction marks, which names in some scripts need."""


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
    if not checked.strip():
        raise PromptFailed(ErrorCode.INVALID_PROMPT, f"{name} is empty; describe the image")
    return checked


def _joined(tags: object) -> str:
    if not isinstance(tags, list | tuple):
        raise invalid_value("prompt_tags", tags, "must be a list of texts")
    for tag in tags:
        if type(tag) is not str:
            raise invalid_value("prompt_tags", tag, "must contain only texts")
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
    if not math.isfinite(value) or not low <= value <= high:
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
        raise invalid_value(name, value, f"must be one of {', '.join(known)}{nearest(str(value), known)}")
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
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}…"
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, f"{name} {rule}; it is {shown}")
