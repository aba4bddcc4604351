"""The text of a file → its entries, one by one, each with the line on which it begins.

JSON (a list), JSON lines, YAML (a list), CSV (a header) and plain text (a prompt a line). No more of a file
is in memory than the entry that is read and what was read ahead. Does not know what an entry may hold.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from text2img.errors import ConfigurationError
from text2img.intake import json_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TextIO

    Entries = Iterator[tuple[int, object]]

_WHOLE = (
    *("seed", "num_inference_steps", "width", "height", "num_images"),
    *("signature_opacity", "image_quality"),
)
_REAL = ("guidance_scale", "priority")
_JSON = ("lora", "prompt_tags")


def format_of(path: str) -> str:
    """The format that a file's name tells of: its ending. Raises ConfigurationError for any other."""
    suffix = Path(path).suffix.lower()
    if suffix not in _PARSERS:
        raise ConfigurationError(f"the file's name must end in one of {', '.join(_PARSERS)}")
    return suffix


def guess(file: TextIO) -> str:
    """The format that a text looks like."""
    start = ""
    while len(start) < 2 and (more := file.read(1000)):
        start = (start + more).lstrip()
    beginnings = {"[": ".json", "{": ".jsonl", "- ": ".yaml"}
    return next((suffix for begins, suffix in beginnings.items() if start.startswith(begins)), ".txt")


def entries(kind: str, file: TextIO, name: str) -> Iterator[tuple[int, object]]:
    """The entries with their lines; of a whole file, from its start.

    Raises ConfigurationError, with the ``name``, for a broken text.
    """
    import yaml

    try:
        yield from _PARSERS[kind](file)
    except yaml.MarkedYAMLError as exc:
        line = exc.problem_mark.line + 1 if exc.problem_mark else 1
        raise ConfigurationError(f"{name}, line {line}: {exc.problem}") from exc
    except (ValueError, csv.Error, yaml.YAMLError, RecursionError) as exc:
        raise ConfigurationError(f"{name}: {str(exc).splitlines()[0]}") from exc


def _yaml(file: TextIO) -> Entries:
    from text2img.intake import yaml_stream

    return yaml_stream.entries(file)


def _json_lines(file: TextIO) -> Entries:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, json.loads(line.removesuffix("\n"))
            except ValueError as exc:
                raise ValueError(f"line {number} is no JSON: {exc}") from exc


def _csv(file: TextIO) -> Entries:
    """Rows by their header; an empty cell asks for nothing, a number is read as one where one belongs."""
    reader = csv.DictReader(file, strict=True)
    before = 1
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num} has another number of cells than the header")
        yield before + 1, {name: _cell(name, cell) for name, cell in row.items() if cell != ""}
        before = reader.line_num


def _cell(name: str, cell: str) -> object:
    """A cell's value: what no number, or no JSON, can be read from stays text, for the check to name it."""
    try:
        if name in _WHOLE:
            return int(cell)
        if name in _REAL:
            return float(cell)
        return json.loads(cell) if name in _JSON else cell
    except (ValueError, RecursionError):
        return math.nan if cell.lower() == "nan" else cell


def _text(file: TextIO) -> Entries:
    """A prompt a line; empty lines and lines that begin with ``#`` are passed over."""
    for number, line in enumerate(file, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()


_PARSERS: dict[str, Callable[[TextIO], Entries]] = {
    ".json": json_stream.entries,
    ".jsonl": _json_lines,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".csv": _csv,
    ".txt": _text,
}
