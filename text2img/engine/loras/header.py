"""The header of a safetensors file, checked without reading its tensors."""

from __future__ import annotations

import json
import os
import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_MAX_HEADER_BYTES: Final = 10_000_000
"""Maximum size of a header. Real ones have less than a tenth of it; parsed, it takes many times its size."""


def check_header(file: Path) -> None:
    """Raise ValueError with a reason if the file is not a complete safetensors file."""
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"it is not a safetensors file, but {_describe_content(start)}")
        header = _parse_header(opened.read(length))
    spans = sorted(_span(name, tensor) for name, tensor in header.items() if name != "__metadata__")
    bounds = [(0, 0), *spans, (size - 8 - length, size - 8 - length)]
    if any(first[1] != second[0] for first, second in pairwise(bounds)):
        raise ValueError("it is corrupt: its tensors do not fill the file")


def _parse_header(data: bytes) -> dict[str, object]:
    try:
        header = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("it is not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict) or len(header.keys() - {"__metadata__"}) == 0:
        raise ValueError("it contains no tensors")
    return header


def _span(name: str, tensor: object) -> tuple[int, int]:
    """Return a tensor's start and end offsets, counted from the end of the header."""
    offsets = tensor.get("data_offsets") if isinstance(tensor, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int for offset in offsets)
    ):
        raise ValueError(f"its header has no valid offsets for {name[:60]!r}")
    if not 0 <= offsets[0] <= offsets[1]:
        raise ValueError(f"its header has impossible offsets for {name[:60]!r}")
    return offsets[0], offsets[1]


def _describe_content(start: bytes) -> str:
    if start[:1] == b"<":
        return "a web page"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "a pickle, which could run code and is never loaded"
    return "another format, or too short"
