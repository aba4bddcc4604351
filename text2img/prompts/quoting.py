"""Values that anyone may have written: quoted with bounds, and converted to JSON that every reader accepts.

Quotations are bounded in length, work and depth. What JSON has no form for is null or text.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import date
from itertools import islice
from typing import Final

_MAX_CHARS: Final = 60
_MAX_ITEMS: Final = 20
_MAX_DEPTH: Final = 3
_LARGE_INTEGER: Final = 10**30


def quoted(value: object) -> str:
    """Return a value as Python writes it, in at most 60 printable characters.

    Only the beginning of the value is converted, so that neither its size nor its depth matters.
    """
    shown = _beginning(value, _MAX_DEPTH)
    return shown if len(shown) <= _MAX_CHARS else f"{shown[: _MAX_CHARS - 3]}…"


def _beginning(value: object, depth: int) -> str:
    if isinstance(value, str | bytes):
        return repr(value[: _MAX_CHARS + 1])
    if isinstance(value, Mapping | list | tuple):
        return _container(value, depth)
    if isinstance(value, int) and not -_LARGE_INTEGER < value < _LARGE_INTEGER:
        return "a number of more than 30 digits"
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 - a type of a database's, which may hold anything
        return f"a value of the type {type(value).__name__}"


def _container(value: Mapping[object, object] | list[object] | tuple[object, ...], depth: int) -> str:
    if isinstance(value, Mapping):
        pairs = islice(value.items(), _MAX_ITEMS) if depth else ()
        members = [
            f"{_beginning(name, depth - 1)}: {_beginning(member, depth - 1)}" for name, member in pairs
        ]
        return "{…}" if value and not depth else f"{{{', '.join(members)}}}"
    items = [_beginning(item, depth - 1) for item in value[:_MAX_ITEMS]] if depth else []
    return "[…]" if value and not depth else f"[{', '.join(items)}]"


_JSON_DEPTH: Final = 100
"""Levels of objects and lists; deeper ones are null, as many readers accept no more."""
_INTEGERS: Final = range(-(2**63), 2**64)
"""Integers that stay numbers: those of 64 bits, signed or not."""
_MAX_BITS: Final = 1_024
"""Size up to which a larger integer becomes text; a larger one is null."""


def json_text(document: object, *, indent: int | None = None) -> str:
    """Return the document as JSON in ASCII, whatever it holds."""
    return json.dumps(json_value(document), ensure_ascii=True, allow_nan=False, indent=indent)


def json_value(value: object, depth: int = 0) -> object:
    """Return the value in the types of JSON. Never raises.

    NaN, infinity, integers beyond 1,024 bits and values nested too deep become None. Integers beyond 64 bits,
    dates and other types become text, bytes become Base64.
    """
    plain: object
    if value is None or isinstance(value, bool):
        plain = value
    elif isinstance(value, int | float):
        plain = _number(value)
    elif isinstance(value, bytes | bytearray | memoryview):
        plain = base64.b64encode(value).decode()
    elif isinstance(value, Mapping | Sequence | AbstractSet) and not isinstance(value, str):
        plain = None if depth >= _JSON_DEPTH else _nested(value, depth + 1)
    else:
        plain = value.isoformat() if isinstance(value, date) else _as_text(value)
    return plain


def plain_text(text: str) -> str:
    """Return the text with its lone surrogates, which UTF-8 cannot hold, escaped by a backslash."""
    return str.encode(text, "utf-8", "backslashreplace").decode()


def _nested(value: Mapping[object, object] | Sequence[object] | AbstractSet[object], depth: int) -> object:
    try:
        if isinstance(value, Mapping):
            return {_as_text(name): json_value(each, depth) for name, each in value.items()}
        return [json_value(each, depth) for each in value]
    except Exception:  # noqa: BLE001 - a type of a library, of which only the value is known
        return None


def _number(value: int | float) -> int | float | str | None:  # noqa: PYI041 - the types are distinguished
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    number = int(value)  # without the subclass, such as BSON's Int64
    if number in _INTEGERS:
        return number
    return str(number) if number.bit_length() <= _MAX_BITS else None


def _as_text(value: object) -> str:
    try:
        return plain_text(value if isinstance(value, str) else str(value))
    except Exception:  # noqa: BLE001 - as above
        return type(value).__name__
