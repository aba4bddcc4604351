"""What a single value of a document may be: text, a number, pixels, one of some words.

Each check returns the value as it is worked with, or raises PromptFailed with a sentence that begins with the
field's name. Knows no field by itself but a prompt's text.
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
"""Characters: some 100 times what CLIP reads at once; beyond that a text is a mistake."""
MAX_NAME_CHARS: Final = 200
"""Characters of an artist's name."""
_UNREADABLE: Final = re.compile("[\0\ud800-\udfff]")
_STEERING: Final = "\u200c\u200d\u200e\u200f"
"""Joiners and direction marks, which names of some scripts need."""


def check_prompt_text(text: object, tags: object = None) -> str:
    """The prompt's text, or its tags (a list of texts) joined by spaces where it has no text.

    Raises PromptFailed (``invalid_prompt``) where there is none that can be drawn.
    """
    if text is None and tags is None:
        raise PromptFailed(ErrorCode.INVALID_PROMPT, "text is missing; write what the picture shall show")
    name = "text" if text is not None else "prompt_tags"
    try:
        written = check_text(name, _joined(tags) if text is None else text)
    except PromptFailed as exc:
        raise PromptFailed(ErrorCode.INVALID_PROMPT, str(exc)) from None
    if not written.strip():
        raise PromptFailed(ErrorCode.INVALID_PROMPT, f"{name} is empty; write what the picture shall show")
    return written


def _joined(tags: object) -> str:
    if not isinstance(tags, list | tuple):
        raise invalid_value("prompt_tags", tags, "must be a list of texts")
    for tag in tags:
        if type(tag) is not str:
            raise invalid_value("prompt_tags", tag, "must hold nothing but texts")
    return " ".join(tags)


def check_text(name: str, value: object) -> str:
    """A string that a tokenizer can read: no NUL, no lone surrogate, not endless."""
    if type(value) is not str:  # BSON's JavaScript is a kind of str, and no text
        raise invalid_value(name, value, "must be text")
    if len(value) > MAX_TEXT_CHARS:
        raise too_long_error(name, len(value), MAX_TEXT_CHARS)
    if _UNREADABLE.search(value):
        raise PromptFailed(
            ErrorCode.INVALID_PARAMETERS, f"{name} holds a NUL or half a surrogate pair; write plain Unicode"
        )
    return value


def check_name(name: str, value: object) -> str:
    """A line of at most LONGEST_NAME characters, without the blanks around it; empty where it is blank."""
    line = check_text(name, value)
    for char in line:
        if is_control_character(char):
            raise PromptFailed(
                ErrorCode.INVALID_PARAMETERS,
                f"{name} holds the control character U+{ord(char):04X}; write it in one line of plain text",
            )
    if len(line) > MAX_NAME_CHARS:
        raise too_long_error(name, len(line), MAX_NAME_CHARS)
    return line.strip()


def is_control_character(char: str) -> bool:
    """Whether a character is not seen but steers what is (breaks a line, hides), and no name needs it."""
    return unicodedata.category(char) in {"Cc", "Cf", "Zl", "Zp"} and char not in _STEERING


def check_integer(name: str, value: object, low: int, high: int) -> int:
    """An integer in [low, high]; 30.0 passes, since JavaScript shells store every number as a double."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise invalid_value(name, value, "must be a whole number")
    if not low <= value <= high:
        raise invalid_value(name, value, f"must be between {low} and {high}")
    return int(value)


def check_number(name: str, value: object, low: float, high: float) -> float:
    """A finite number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid_value(name, value, "must be a number")
    if not math.isfinite(value) or not low <= value <= high:
        raise invalid_value(name, value, f"must be a finite number between {low} and {high}")
    return float(value)


def check_pixels(name: str, value: object) -> int:
    """A width or height in pixels: in [64, 4096] and a multiple of 8."""
    pixels = check_integer(name, value, 64, 4096)
    if pixels % 8:
        raise invalid_value(
            name, value, f"must be a multiple of 8; {pixels // 8 * 8} or {pixels // 8 * 8 + 8} would do"
        )
    return pixels


def check_word(name: str, value: object, known: Sequence[str]) -> str:
    """One of the known words."""
    if not isinstance(value, str) or value not in known:
        raise invalid_value(name, value, f"must be one of {', '.join(known)}{nearest(str(value), known)}")
    return value


def nearest(word: str, known: Sequence[str]) -> str:
    """``"; did you mean …?"`` where one of the known words is close, else nothing."""
    close = difflib.get_close_matches(word[:100], known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def too_long_error(name: str, length: int, most: int) -> PromptFailed:
    """What to say of a text that is too long."""
    rule = f"{name} must not be longer than {most:,} characters"
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, f"{rule}; it has {length:,}")


def invalid_value(name: str, value: object, rule: str) -> PromptFailed:
    """What to say of a value that breaks the rule; it is shown, if not at length."""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}…"
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, f"{name} {rule}; it is {shown}")
