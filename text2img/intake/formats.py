"""The text of a file → its entries, each with the line on which it begins.

JSON (a list), JSON lines, YAML (a list), CSV (a header) and plain text (a prompt a line). Does not know what
an entry may hold.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Entries = Iterable[tuple[int, object]]

_WHOLE = (
    *("seed", "num_inference_steps", "width", "height", "num_images"),
    *("signature_opacity", "image_quality"),
)
_REAL = ("guidance_scale", "priority")
_JSON = ("lora", "prompt_tags")
_NO_LIST = "must hold a list of prompts"
_BLANK = re.compile(r"[ \t\r\n]*")  # what JSON takes for blank


def format_of(path: str) -> str:
    """The format that a file's name tells of: its ending. Raises ConfigurationError for any other."""
    suffix = Path(path).suffix.lower()
    if suffix not in _PARSERS:
        raise ConfigurationError(f"the file's name must end in one of {', '.join(_PARSERS)}")
    return suffix


def guess(text: str) -> str:
    """The format that a text looks like."""
    start = text.lstrip()
    beginnings = {"[": ".json", "{": ".jsonl", "- ": ".yaml"}
    return next((suffix for begins, suffix in beginnings.items() if start.startswith(begins)), ".txt")


def entries(kind: str, text: str, name: str) -> Iterator[tuple[int, object]]:
    """The entries with their lines. Raises ConfigurationError, with the ``name``, for a broken text."""
    import yaml

    try:
        yield from _PARSERS[kind](text)
    except yaml.MarkedYAMLError as exc:
        line = exc.problem_mark.line + 1 if exc.problem_mark else 1
        raise ConfigurationError(f"{name}, line {line}: {exc.problem}") from exc
    except (ValueError, csv.Error, yaml.YAMLError, RecursionError) as exc:
        raise ConfigurationError(f"{name}: {str(exc).splitlines()[0]}") from exc


def _json(text: str) -> Entries:
    loaded = json.loads(text)
    at = _skip(text, 0) + 1
    if isinstance(loaded, dict) and "prompts" in loaded:
        at, loaded = _value_of("prompts", text, at) + 1, loaded["prompts"]
    if not isinstance(loaded, list):
        raise ValueError(_NO_LIST)  # noqa: TRY004 - a wrong value of a file, no type
    decoder, line, seen = json.JSONDecoder(), 1, 0
    for entry in loaded:
        at = _skip(text, at)
        line, seen = line + text.count("\n", seen, at), at
        yield line, entry
        at = _skip(text, decoder.raw_decode(text, at)[1]) + 1  # the comma


def _value_of(key: str, text: str, at: int) -> int:
    """Where the value of a key begins, in an object known to be sound whose brace is before ``at``.

    Of keys that stand there twice the last one counts, as it does for ``json.loads``.
    """
    decoder, found = json.JSONDecoder(), at
    while True:
        name, at = decoder.raw_decode(text, _skip(text, at))
        at = _skip(text, _skip(text, at) + 1)  # the colon
        if name == key:
            found = at
        at = _skip(text, decoder.raw_decode(text, at)[1])
        if text[at] == "}":
            return found
        at += 1


def _skip(text: str, at: int) -> int:
    """The next place that is not blank."""
    blank = _BLANK.match(text, at)
    return blank.end() if blank else at


def _yaml(text: str) -> Entries:
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        node: Any = loader.get_single_node()
        loaded: Any = None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()
    if isinstance(loaded, dict) and "prompts" in loaded:
        node = next(value for key, value in node.value if key.value == "prompts")
        loaded = loaded["prompts"]
    if not isinstance(loaded, list):
        raise ValueError(_NO_LIST)  # noqa: TRY004 - as above
    return ((child.start_mark.line + 1, entry) for child, entry in zip(node.value, loaded, strict=True))


def _json_lines(text: str) -> Entries:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as exc:
                raise ValueError(f"line {number} is no JSON: {exc}") from exc


def _csv(text: str) -> Entries:
    """Rows by their header; an empty cell asks for nothing, a number is read as one where one belongs."""
    reader = csv.DictReader(io.StringIO(text), strict=True)
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


def _text(text: str) -> Entries:
    """A prompt a line; empty lines and lines that begin with ``#`` are passed over."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()


_PARSERS: dict[str, Callable[[str], Entries]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".csv": _csv,
    ".txt": _text,
}
