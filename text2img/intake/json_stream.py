"""A list in a JSON text of any length → its entries, one by one, each with its line.

``json`` reads each entry; only the text around the one that it is at is in memory. Whatever is broken
is said as ``json.loads`` says it. Does not know what an entry may hold.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NoReturn, TextIO

NO_LIST: Final = "must hold a list of prompts"
_CHUNK: Final = 2**16
"""Characters that are read at once."""
_BROKEN_OFF: Final = 16
"""Characters before its end at which a text that is broken off may look wrong: more than a token has that
is no string."""
_BLANK: Final = re.compile(r"[ \t\r\n]*")  # what JSON takes for blank


def entries(file: TextIO) -> Iterator[tuple[int, object]]:
    """The entries of a list, or of the list under ``prompts``, with their lines.

    Of keys that stand there twice the last one counts, as for ``json.loads``: they are counted first. Other
    values than that list are read whole. Raises ValueError.
    """
    window = Window(file)
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
        raise ValueError(NO_LIST)
    file.seek(0)
    for number, found in enumerate(_lists(Window(file)), 1):
        if number == lists:
            if found is None:
                raise ValueError(NO_LIST)
            yield from found


def _lists(window: Window) -> Iterator[Iterator[tuple[int, object]] | None]:
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


class Window:
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

    def _fail(self, sentence: str, at: int) -> NoReturn:
        self._pass(at)
        place = self._before + at
        column = place - self._line_start + 1
        raise ValueError(f"{sentence}: line {self.line} column {column} (char {place})")
