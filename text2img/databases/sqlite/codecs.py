"""SQLite's values as prompt ids, moments and flags, and back."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from text2img.prompts import PromptId

if TYPE_CHECKING:
    from collections.abc import Mapping

Value = int | float | str | bytes | None

_INT64: Final = range(-(2**63), 2**63)
_TAGGED: Final = re.compile(rb"([a-z]+):(.*)", re.DOTALL)
_TEXT: Final = "text"
"""The kind of an id that is TEXT and yet no UTF-8, as an import in another encoding leaves it: its bytes."""

ID: Final = "COALESCE(CAST(:raw AS TEXT), :id)"
"""A prompt's id in a statement. Python's sqlite3 passes text as UTF-8 alone, so other text goes as bytes."""


def id_of(value: Value) -> PromptId:
    """The prompt id of an ``_id`` as it stands in its column, whatever its type."""
    if isinstance(value, int):
        return PromptId("int", str(value))
    if isinstance(value, float):
        return PromptId("double", repr(value))
    if isinstance(value, bytes):
        return _id_of_bytes(value)
    if value and _is_half(value):
        return PromptId(_TEXT, value.encode("utf-8", "surrogateescape").hex())
    return PromptId("str", value or "")


def value_of(prompt_id: PromptId) -> Value:
    """What stands for the id in a column: 7 and "7" stay two ids, and so does every kind SQLite lacks.

    INTEGER, REAL and TEXT for what fits them, else a BLOB of ``kind:text``.
    """
    kind, text = prompt_id.kind, prompt_id.text
    if kind == "int" and int(text) in _INT64:
        return int(text)
    if kind == "double" and not math.isnan(float(text)):  # SQLite keeps infinity, and NaN as NULL
        return float(text)
    if kind == "blob":
        return bytes.fromhex(text)
    if kind == "str" and not _is_half(text):
        return text
    return f"{kind}:{text}".encode("utf-8", "surrogatepass")


def names_of(prompt_id: PromptId) -> dict[str, Value]:
    """The values that ID names."""
    raw = bytes.fromhex(prompt_id.text) if prompt_id.kind == _TEXT else None
    return {"id": value_of(prompt_id), "raw": raw}


def moment(seconds: float = 0) -> str:
    """The moment ``seconds`` from now, in UTC, as text that sorts by time and that sqlite3's shell shows.

    It is the worker's clock: whoever shares the file shares the machine, and so the clock.
    """
    return text_of(datetime.now(UTC) + timedelta(seconds=seconds))


def text_of(at: datetime) -> str:
    """A moment as it is kept: ISO 8601 in UTC, to the millisecond."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}Z"


def datetime_of(value: object) -> datetime | None:
    """The moment that a column holds, or None where it holds none."""
    if not isinstance(value, str):
        return None
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        return None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def columns_of(fields: Mapping[str, object]) -> dict[str, object]:
    """The fields as columns hold them: objects and lists as JSON, moments as text."""
    return {name: _column(value) for name, value in fields.items()}


def object_of(value: object) -> dict[str, object]:
    """The object that a column holds as JSON; empty where it holds none."""
    read = structure_of(value)
    return read if isinstance(read, dict) else {}


def structure_of(value: object) -> object:
    """The object or list that a column holds as JSON; whatever else it holds, as it is."""
    try:
        read = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return value
    return read if isinstance(read, dict | list) else value


def _column(value: object) -> object:
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, ensure_ascii=False)
    return text_of(value) if isinstance(value, datetime) else value


def _is_half(text: str) -> bool:
    """Whether it holds a surrogate: half of a pair, or the stand-in of a byte that is no UTF-8."""
    return any("\ud800" <= char <= "\udfff" for char in text)


def _id_of_bytes(value: bytes) -> PromptId:
    """Bytes that this module wrote are an id of their kind; any others are an id that is bytes."""
    parts = _TAGGED.fullmatch(value)
    if parts:
        try:
            read = PromptId(parts[1].decode(), parts[2].decode("utf-8", "surrogatepass"))
            if value_of(read) == value and read.kind != "blob":
                return read
        except ValueError:  # not UTF-8, or no number: somebody else's bytes
            pass
    return PromptId("blob", value.hex())
