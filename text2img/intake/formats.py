"""Parsers of prompt files: JSON, JSON lines, YAML, CSV and text; each yields entries with their lines.

JSON lists of any length are streamed: ``json`` parses each entry, and only the text around it is in memory.
Syntax errors have the messages of ``json.loads``.
"""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from text2img.errors import ConfigurationError
from text2img.prompts.quoting import quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import NoReturn, TextIO


MAX_DIGITS: Final = 400
"""More digits than any number of a prompt has. Python needs quadratic time for long ones."""
_MAX_REPEATED_KEYS: Final = 10
_MAX_MESSAGE_CHARS: Final = 300
NESTED_TOO_DEEPLY: Final = "is nested too deeply"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The place of an entry that cannot be read, with its errors; the parser has read on behind it."""

    errors: list[str]


def bounded_int(digits: str) -> int:
    """Convert a number's digits; more than MAX_DIGITS become an integer that every check refuses."""
    if len(digits) <= MAX_DIGITS:
        return int(digits)
    refused: int = 10**MAX_DIGITS
    return -refused if digits.startswith("-") else refused


def repeated_keys(keys: Iterable[object]) -> list[str]:
    """Return the errors for keys that occur twice in one mapping."""
    return [f"{_key_name(key)} occurs twice" for key in islice(keys, _MAX_REPEATED_KEYS)]


def _key_name(key: object) -> str:
    plain = isinstance(key, str) and key.isidentifier() and key.isascii()
    return str(key) if plain and quoted(key) == repr(key) else quoted(key)


def one_line(exc: BaseException | str | None) -> str:
    """Return an error's first line without control characters, at most _MAX_MESSAGE_CHARS long."""
    text = str(exc).strip() or type(exc).__name__
    line = text[: _MAX_MESSAGE_CHARS + 1].splitlines()[0][:_MAX_MESSAGE_CHARS]
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


class JsonDecoder(json.JSONDecoder):
    """Python's decoder, with bounded integers; ``repeated`` are the keys that occur twice in one object.

    The caller clears ``repeated`` before each value.
    """

    def __init__(self) -> None:
        self.repeated: list[str] = []
        super().__init__(object_pairs_hook=self._object, parse_int=bounded_int)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self.repeated.append(key)
                seen.add(key)
        return members


NOT_A_LIST: Final = "must hold a list of prompts"
_CHUNK_CHARS: Final = 2**16
"""The characters read at once."""
_MAX_TOKEN_CHARS: Final = 16
"""More characters than any token but a string has. An error closer to the window's end may be due to a token
that is cut off there."""
_WHITE_SPACE: Final = re.compile(r"[ \t\r\n]*")  # JSON's white space


def json_entries(file: TextIO) -> Iterator[tuple[int, object]]:
    """Yield the entries of a list, or of the list under ``prompts``, with their lines.

    Other values than that list are read as a whole; a key of them that occurs twice is an entry that is
    Unreadable. Raises ValueError.
    """
    stream = JsonStream(file)
    if stream.peek() == "[":
        yield from stream.items()
    elif stream.peek() == "{":
        yield from _prompt_list(stream)
    else:
        stream.value()
        stream.expect_end()
        raise ValueError(NOT_A_LIST)
    stream.expect_end()


def _prompt_list(stream: JsonStream) -> Iterator[tuple[int, object]]:
    """Yield the entries of the list that an object has under ``prompts``."""
    keys: set[str] = set()
    found = False
    for key in stream.member_keys():
        line, first = stream.line, key not in keys
        keys.add(key)
        if first and key == "prompts" and stream.peek() == "[":
            found = True
            yield from stream.items()
            continue
        value = stream.value()
        if not first:
            yield line, Unreadable(repeated_keys([key]))
        if isinstance(value, Unreadable):
            yield line, value
    if not found:
        raise ValueError(NOT_A_LIST)


class JsonStream:
    """A JSON text that is read through a moving window, and counts lines.

    Raises ValueError for invalid JSON, with the position in the whole text.
    """

    def __init__(self, file: TextIO) -> None:
        self.line = 1
        self._file = file
        self._window, self._position, self._ended = "", 0, False
        self._offset = 0  # of the window in the file, in characters
        self._line_start = 0  # of the current line in the file, in characters
        self._decoder = JsonDecoder()

    def peek(self) -> str:
        """Return the next character that is not white space, without consuming it; empty at the end."""
        while True:
            white_space = _WHITE_SPACE.match(self._window, self._position)
            self._advance(white_space.end() if white_space else self._position)
            if self._position < len(self._window):
                return self._window[self._position]
            if not self._read_more():
                return ""

    def value(self) -> object:
        """Read the next value, or Unreadable if a key of it occurs twice."""
        self.peek()
        while True:
            self._decoder.repeated.clear()
            try:
                value, end = self._decoder.raw_decode(self._window, self._position)
            except RecursionError:
                self._fail("a value " + NESTED_TOO_DEEPLY, self._position)
            except json.JSONDecodeError as exc:
                near_end = exc.pos + _MAX_TOKEN_CHARS > len(self._window)
                cut_off = near_end or exc.msg.startswith("Unterminated string")
                if self._ended or not cut_off:
                    self._fail(exc.msg, exc.pos)
            else:
                if end + 2 < len(self._window) or self._ended:  # else a number may continue, as 1 in 1e+9
                    self._advance(end)
                    repeated = self._decoder.repeated
                    return Unreadable(repeated_keys(repeated)) if repeated else value
            self._read_more()

    def items(self) -> Iterator[tuple[int, object]]:
        """Yield the values of the next list, with their lines."""
        self._expect("[", "Expecting value")
        if self.peek() != "]":
            while True:
                self.peek()
                yield self.line, self.value()
                if self.peek() == "]":
                    break
                self._expect(",", "Expecting ',' delimiter")
        self._expect("]", "Expecting ',' delimiter")

    def member_keys(self) -> Iterator[str]:
        """Yield the keys of the next object; the caller must read each value before the next key."""
        self._expect("{", "Expecting value")
        if self.peek() != "}":
            while True:
                if self.peek() != '"':
                    self._fail("Expecting property name enclosed in double quotes", self._position)
                key = str(self.value())
                self._expect(":", "Expecting ':' delimiter")
                yield key
                if self.peek() == "}":
                    break
                self._expect(",", "Expecting ',' delimiter")
        self._expect("}", "Expecting ',' delimiter")

    def expect_end(self) -> None:
        """Raise ValueError unless the text ends here."""
        if self.peek():
            self._fail("Extra data", self._position)

    def _expect(self, char: str, message: str) -> None:
        if self.peek() != char:
            self._fail(message, self._position)
        self._advance(self._position + 1)

    def _advance(self, position: int) -> None:
        """Move to that position of the window."""
        if lines := self._window.count("\n", self._position, position):
            self.line += lines
            self._line_start = self._offset + self._window.rindex("\n", self._position, position) + 1
        self._position = position

    def _read_more(self) -> bool:
        """Drop the consumed text and read at least as much as is left; return False at the file's end."""
        more = self._file.read(max(_CHUNK_CHARS, len(self._window) - self._position))
        self._offset += self._position
        self._window, self._position = self._window[self._position :] + more, 0
        self._ended = not more
        return bool(more)

    def _fail(self, message: str, position: int) -> NoReturn:
        self._advance(position)
        char = self._offset + position
        column = char - self._line_start + 1
        raise ValueError(f"{message}: line {self.line} column {column} (char {char})")


if TYPE_CHECKING:
    Entries = Iterator[tuple[int, object]]

_INTEGER_FIELDS = (
    *("seed", "num_inference_steps", "width", "height", "num_images"),
    *("signature_opacity", "image_quality"),
)
_NUMBER_FIELDS = ("guidance_scale", "true_cfg_scale", "priority")
_JSON_FIELDS = ("lora", "prompt_tags")


def format_of(path: str) -> str:
    """Return the format of a file by its name's ending; raise ConfigurationError for an unknown one."""
    suffix = Path(path).suffix.lower()
    if suffix not in _PARSERS:
        raise ConfigurationError(
            f"the file's name must end in one of {', '.join(_PARSERS)}; enqueue also takes --format"
        )
    return suffix


def entries(kind: str, file: TextIO, name: str) -> Iterator[tuple[int, object]]:
    """Yield the entries of a file, from its start, with their lines.

    Raises ConfigurationError, which contains the ``name``, for invalid syntax.
    """
    import yaml

    try:
        yield from _PARSERS[kind](file)
    except yaml.MarkedYAMLError as exc:
        line = exc.problem_mark.line + 1 if exc.problem_mark else 1
        raise ConfigurationError(f"{name}, line {line}: {one_line(exc.problem)}") from exc
    except (ValueError, csv.Error, yaml.YAMLError) as exc:
        raise ConfigurationError(f"{name}: {one_line(exc)}") from exc
    except (ArithmeticError, LookupError, MemoryError, RecursionError, TypeError) as exc:
        raise ConfigurationError(f"{name} cannot be read: {one_line(exc)}") from exc


def _yaml(file: TextIO) -> Entries:
    from text2img.intake import yaml_stream

    return yaml_stream.entries(file)


def _json_lines(file: TextIO) -> Entries:
    decoder = JsonDecoder()
    for number, line in enumerate(file, 1):
        if line.strip():
            decoder.repeated.clear()
            entry: object
            try:
                entry = decoder.decode(line.removesuffix("\n"))
            except RecursionError:
                entry = Unreadable([NESTED_TOO_DEEPLY])
            except ValueError as exc:
                raise ValueError(f"line {number} is not JSON: {exc}") from exc
            yield number, Unreadable(repeated_keys(decoder.repeated)) if decoder.repeated else entry


_SEPARATORS: Final = {",": "commas", ";": "semicolons", "\t": "tabs"}
_SEPARATOR_LINE: Final = re.compile(r'"?sep=([^"\n]|\t)"?[,;\t]*\s*', re.IGNORECASE)
_TEXT_COLUMNS: Final = frozenset(("text", "prompt", "prompt_tags"))
_BLANKS: Final = " \t\xa0" + "".join(_SEPARATORS)
_MAX_HEADER_CHARS: Final = 2**16


def csv_header(line: str) -> tuple[str, list[str]]:
    """Return the separator of a header, and its cells: the one with which it names a prompt's text."""
    found = {each: _cells(line, each) for each in _SEPARATORS}
    separator = max(
        found,
        key=lambda each: (not _TEXT_COLUMNS.isdisjoint(map(str.casefold, found[each])), len(found[each])),
    )
    return separator, found[separator]


def is_csv_header(line: str) -> bool:
    """Return True for a row that names a prompt's text; not for prose, such as "a neon sign, text"."""
    separator, cells = csv_header(line)
    exact = line.strip("\r\n").replace('"', "").split(separator)
    words = [cell.casefold() for cell in cells]
    if _TEXT_COLUMNS.isdisjoint(words):
        return False
    return not _TEXT_COLUMNS.isdisjoint(exact) or not any(" " in cell for cell in cells)


def _cells(line: str, separator: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=separator), [])]
    except csv.Error:
        return []


def _csv(file: TextIO) -> Entries:
    """Yield rows as mappings by the header, without empty cells; the cells of number fields are numbers.

    The separator is given in a first line such as ``sep=;``, as spreadsheets write it, or follows from the
    header. Rows without any value are skipped.
    """
    first, before = file.readline(_MAX_HEADER_CHARS), 0
    if stated := _SEPARATOR_LINE.fullmatch(first):
        separator, before = stated[1], 1
    else:
        separator = csv_header(first)[0]
        file.seek(0)
    rows = _rows(file, separator, before)
    _, header = next(rows, (0, []))
    names = [name.strip() for name in header]
    if repeated := [name for index, name in enumerate(names) if name and name in names[:index]]:
        raise ValueError(f"line {before + 1}: the column {repeated_keys(repeated)[0]}")
    for line, row in rows:
        if not any(cell.strip(_BLANKS) for cell in row):
            continue
        cells = {index: cell for index, cell in enumerate(row) if cell.strip()}
        if len(row) < len(names) or max(cells) >= len(names):
            apart = _SEPARATORS.get(separator, quoted(separator))
            counts = f"{len(row)} and {len(names)}, separated by {apart}"
            raise ValueError(f"line {line} has a different number of cells than the header: {counts}")
        if names and not names[0] and cells.get(0, "").isdecimal():
            del cells[0]  # the index that pandas writes
        if unnamed := [index for index in cells if not names[index]]:
            raise ValueError(f"line {line}: column {unnamed[0] + 1} has a value, but no name in the header")
        yield line, _row(names, cells, separator)


def _rows(file: TextIO, separator: str, before: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not empty, with the line on which each begins; ``before`` are lines above them.

    Raises ValueError, with that line, for invalid syntax.
    """
    reader = csv.reader(file, delimiter=separator, strict=True)
    while True:
        line = before + reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as exc:
            raise ValueError(f"line {line}: {exc}; check the quotes of this row") from exc
        if row:
            yield line, row


def _row(names: list[str], cells: dict[int, str], separator: str) -> object:
    """Return the mapping of a row, or Unreadable if a key of a cell's JSON occurs twice."""
    decoder = JsonDecoder()
    row: dict[str, object] = {}
    for index, cell in cells.items():
        name = names[index]
        try:
            row[name] = decoder.decode(cell) if name in _JSON_FIELDS else _cell(name, cell, separator)
        except (ValueError, RecursionError):
            row[name] = cell  # for the validation to report
    return Unreadable(repeated_keys(decoder.repeated)) if decoder.repeated else row


_WHOLE: Final = re.compile(r"\s*([-+]?[0-9]{1,30})\.0*\s*")
_DECIMAL_COMMA: Final = re.compile(r"\s*([-+]?[0-9]{1,30}),([0-9]{1,30})\s*")
_THOUSANDS: Final = re.compile(r"\s*[-+]?[1-9][0-9]{0,2}(?:\.[0-9]{3})+\s*")
_MAX_EXACT: Final = 2**53


def _cell(name: str, cell: str, separator: str) -> object:
    """Return a cell's value. Raises ValueError for one that is not what its field needs."""
    if name not in (*_INTEGER_FIELDS, *_NUMBER_FIELDS):
        return cell
    if separator != "," and _THOUSANDS.fullmatch(cell):
        raise ValueError("1.000 may be 1 or 1000")
    if separator != "," and (comma := _DECIMAL_COMMA.fullmatch(cell)):
        cell = f"{comma[1]}.{comma[2]}"
    if name in _NUMBER_FIELDS:
        return float(cell)
    if whole := _WHOLE.fullmatch(cell):  # pandas writes 7.0 where another cell of the column is empty
        return int(whole[1])
    try:
        return int(cell)
    except ValueError:
        number = float(cell)
    return number if abs(number) < _MAX_EXACT or math.isnan(number) else cell


def _text_lines(file: TextIO) -> Entries:
    from text2img.intake import webui

    return webui.entries(file)


_PARSERS: dict[str, Callable[[TextIO], Entries]] = {
    ".json": json_entries,
    ".jsonl": _json_lines,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".csv": _csv,
    ".txt": _text_lines,
}
