"""Whether a file is safetensors, by its header alone: no tensor is read, nothing in it is run.

The format (github.com/huggingface/safetensors): 8 bytes, the header's length, least significant first; the
header, JSON; the tensors' bytes, one after another without a gap.
"""

from __future__ import annotations

import json
import os
import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_LONGEST: Final = 100_000_000
"""Bytes of a header; the library's own bound."""


def check_header(file: Path) -> None:
    """Raise ValueError with a reason where the file is no whole safetensors file."""
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_LONGEST, size - 8):
            raise ValueError(f"it is no safetensors file, but {_looks_like(start)}")
        header = _json(opened.read(length))
    spans = sorted(_span(name, told) for name, told in header.items() if name != "__metadata__")
    ends = [(0, 0), *spans, (size - 8 - length, size - 8 - length)]
    if any(first[1] != second[0] for first, second in pairwise(ends)):
        raise ValueError("it is torn: its tensors do not fill the file")


def _json(header: bytes) -> dict[str, object]:
    try:
        told = json.loads(header)
    except (ValueError, RecursionError):
        raise ValueError("it is no safetensors file: its header is not JSON") from None
    if not isinstance(told, dict) or len(told.keys() - {"__metadata__"}) == 0:
        raise ValueError("it holds no tensors")
    return told


def _span(name: str, told: object) -> tuple[int, int]:
    """Where a tensor begins and ends, behind the header."""
    offsets = told.get("data_offsets") if isinstance(told, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(each) is int for each in offsets):
        raise ValueError(f"its header does not say where {name[:60]!r} is")
    if not 0 <= offsets[0] <= offsets[1]:
        raise ValueError(f"its header misplaces {name[:60]!r}")
    return offsets[0], offsets[1]


def _looks_like(start: bytes) -> str:
    if start[:1] == b"<":
        return "a web page"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "a pickle, which could run code and is never opened"
    return "something else, or too short"
