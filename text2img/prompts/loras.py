"""LoRAs as a prompt or a model configuration asks for them, checked.

Knows where one is said to be and how strongly it shall count; fetches and reads nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from text2img.errors import ErrorCode, PromptFailed

MOST: Final = 8
"""LoRAs of one picture."""
LONGEST_PATH: Final = 2_000
"""Characters; signed URLs are long."""
HEAVIEST: Final = 10.0
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
    if len(entries) > MOST:
        raise _refused(f"lora must not name more than {MOST}; it names {len(entries)}")
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
    if len(value) > LONGEST_PATH:
        raise _refused(f"{which} path must not be longer than {LONGEST_PATH:,} characters")
    if any(char < " " or char == "\x7f" or "\ud800" <= char <= "\udfff" for char in value):
        raise _refused(f"{which} path holds a control character or half a surrogate pair")
    return value


def _weight(which: str, value: object) -> float:
    if value is None:
        return 1.0
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or abs(value) > HEAVIEST:  # type: ignore[arg-type]
        raise _refused(f"{which} weight must be a finite number between {-HEAVIEST:g} and {HEAVIEST:g}")
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


def _refused(sentence: str) -> PromptFailed:
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, sentence)
