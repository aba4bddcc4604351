"""A list in a JSON text of any length → its entries, one by one, each with its line.

``json`` reads each entry; only the text around the one that it is at is in memory. Whatever is broken
is said as ``json.loads`` says it. Does not know what an entry may hold.
"""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn, TextIO


NOT_A_LIST: Final = "must hold a list of prompts"
_CHUNK: Final = 2**16
"""Characters that are read at once."""
_BROKEN_OFF: Final = 16
"""Characters before its end at which a text that is broken off may look wrong: more than a token has that
is no string."""
_BLANK: Final = re.compile(r"[ \t\r\n]*")  # what JSON takes for blank


def json_entries(file: TextIO) -> Iterator[tuple[int, object]]:
    """The entries of a list, or of the list under ``prompts``, with their lines.

    Of keys that stand there twice the last one counts, as for ``json.loads``: they are counted first. Other
    values than that list are read whole. Raises ValueError.
    """
    window = JsonStream(file)
    if window.next() == "[":
        yield from window.items()
        window.end()
        return
    lists = 0
    if window.next() == "{":
        lists = sum(1 for _ in _lists(window))
    else:
        window.value()
    window.end()
    if not lists:
        raise ValueError(NOT_A_LIST)
    file.seek(0)
    for number, found in enumerate(_lists(JsonStream(file)), 1):
        if number == lists:
            if found is None:
                raise ValueError(NOT_A_LIST)
            yield from found


def _lists(window: JsonStream) -> Iterator[Iterator[tuple[int, object]] | None]:
    """The entries of each value that an object has under ``prompts``; None for one that is no list."""
    for key in window.members():
        if key == "prompts" and window.next() == "[":
            items = window.items()
            yield items
            for _ in items:  # what nobody asked for
                pass
            continue
        window.value()
        if key == "prompts":
            yield None


class JsonStream:
    """The part of a JSON text that is being read: it moves on, and counts lines as it does.

    Raises ValueError for what is no JSON, with its place in the whole text.
    """

    def __init__(self, file: TextIO) -> None:
        self.line = 1
        self._file = file
        self._text, self._at, self._ended = "", 0, False
        self._before = 0  # characters of the file before this window
        self._line_start = 0  # the character of the file with which the line begins
        self._decode = json.JSONDecoder().raw_decode

    def next(self) -> str:
        """The next character that is not blank, which stays; empty at the end."""
        while True:
            blank = _BLANK.match(self._text, self._at)
            self._pass(blank.end() if blank else self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def value(self) -> object:
        """The value that comes next."""
        self.next()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as exc:
                near = exc.msg.startswith("Unterminated string") or exc.pos + _BROKEN_OFF > len(self._text)
                if self._ended or not near:
                    self._fail(exc.msg, exc.pos)
            else:
                if end + 2 < len(self._text) or self._ended:  # else a number may go on, as after 1 in 1e+9
                    self._pass(end)
                    return value
            self._read_on()

    def items(self) -> Iterator[tuple[int, object]]:
        """The values of the list that comes next, with their lines."""
        self._take("[", "Expecting value")
        if self.next() != "]":
            while True:
                self.next()
                yield self.line, self.value()
                if self.next() == "]":
                    break
                self._take(",", "Expecting ',' delimiter")
        self._take("]", "Expecting ',' delimiter")

    def members(self) -> Iterator[str]:
        """The keys of the object that comes next; the value of each must be read before the next one."""
        self._take("{", "Expecting value")
        if self.next() != "}":
            while True:
                if self.next() != '"':
                    self._fail("Expecting property name enclosed in double quotes", self._at)
                key = str(self.value())
                self._take(":", "Expecting ':' delimiter")
                yield key
                if self.next() == "}":
                    break
                self._take(",", "Expecting ',' delimiter")
        self._take("}", "Expecting ',' delimiter")

    def end(self) -> None:
        """Nothing comes any more."""
        if self.next():
            self._fail("Extra data", self._at)

    def _take(self, char: str, otherwise: str) -> None:
        if self.next() != char:
            self._fail(otherwise, self._at)
        self._pass(self._at + 1)

    def _pass(self, at: int) -> None:
        """Go on to that place of the window."""
        if lines := self._text.count("\n", self._at, at):
            self.line += lines
            self._line_start = self._before + self._text.rindex("\n", self._at, at) + 1
        self._at = at

    def _read_on(self) -> bool:
        """Leave behind what is read, and read as much again as is left; False at the end of the file."""
        more = self._file.read(max(_CHUNK, len(self._text) - self._at))
        self._before += self._at
        self._text, self._at = self._text[self._at :] + more, 0
        self._ended = not more
        return bool(more)

    def _fail(self, message: str, at: int) -> NoReturn:
        self._pass(at)
        place = self._before + at
        column = place - self._line_start + 1
        raise ValueError(f"{message}: line {self.line} column {column} (char {place})")


if TYPE_CHECKING:
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
    ".json": json_entries,
    ".jsonl": _json_lines,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".csv": _csv,
    ".txt": _text,
}
