"""Quotation of values that anyone may have written: bounded in length, work and depth."""

from __future__ import annotations

from collections.abc import Mapping
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
