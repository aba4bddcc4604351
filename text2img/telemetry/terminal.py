"""Lines for people, and the standard streams: the only module that prints.

Ids, names and messages come from documents and files of other people. ``escape`` keeps them from controlling
a terminal and from forging a line. Imports little, since it also prints the errors of a wrong command line.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TextIO

from text2img.errors import RunFailed

if TYPE_CHECKING:
    from collections.abc import Mapping

_CONTROLS: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of characters that act instead of being seen: controls (C0, C1), format characters such
as changes of direction, lone surrogates, line and paragraph separators."""
_JOINERS: Final = "\u200c\u200d"
"""Format characters that some scripts and emoji need, and that affect only their neighbours."""
MAX_NAME_CHARS: Final = 100
"""Characters of a name that are shown in a table; ids of runs may have as many."""


def escape(text: str) -> str:
    r"""Return the text as one line: each character that could control a terminal becomes ``\n``, ``\x1b`` ….

    Escaped are controls (C0 and C1), line breaks, changes of direction, invisible format characters, and lone
    surrogates.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(char) if _is_control(char) else char for char in text)


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in _CONTROLS and char not in _JOINERS


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def shorten(name: str, max_chars: int = MAX_NAME_CHARS) -> str:
    """Return a name as it is shown in a table: escaped, and cut with an ellipsis."""
    shown = escape(name[: max_chars + 1])
    return shown if len(shown) <= max_chars else f"{shown[: max_chars - 1]}…"


class _Output:
    """What standard output carries: lines for people, or with ``--json`` one document in their place."""

    json = False
    complete = False  # the document is printed


def choose_output(*, json: bool) -> None:
    """Choose what standard output carries from here on: lines for people, or JSON documents."""
    _Output.json, _Output.complete = json, False


def is_complete() -> bool:
    """Return True if standard output carries JSON and has its one document."""
    return _Output.complete


def prints_json() -> bool:
    """Return True if standard output carries JSON documents."""
    return _Output.json


def print_lines(*lines: str, flush: bool = False) -> None:
    """Print lines for people on standard output, each escaped, unless it carries JSON; see print_document."""
    if not _Output.json:
        print_document("\n".join(map(escape, lines)), flush=flush)


def print_result(result: Mapping[str, object], *, more: bool = False) -> None:
    """Print the command's result as a line of JSON, if standard output carries JSON; see print_document.

    Nothing is printed after that, such as a failure of the clean-up, unless ``more`` documents are to come.
    Whatever it holds, the line is valid JSON in ASCII: NaN is null, and half of a surrogate pair is escaped.
    """
    if _Output.json and not _Output.complete:
        from text2img.prompts.quoting import json_text

        _Output.complete = not more
        print_document(json_text(result), flush=True)


def print_document(text: str, *, flush: bool = False) -> None:
    """Print a document for programs on standard output, unchanged.

    Raises RunFailed if it cannot be written, and BrokenPipeError if nothing reads it any more.
    """
    try:
        print(text, end="" if text.endswith("\n") else "\n", flush=flush)
    except BrokenPipeError:
        raise
    except OSError as exc:
        discard_output()
        raise RunFailed(f"standard output cannot be written: {exc.strerror}") from exc


def can_redraw(stream: TextIO) -> bool:
    """Return True for a terminal on which lines can be drawn again in their place."""
    return stream.isatty() and os.environ.get("TERM") not in {"dumb", "unknown"}


def print_error(*lines: str) -> None:
    """Print lines on standard error, each escaped; what cannot be written there is lost."""
    with suppress(OSError):
        print(*map(escape, lines), sep="\n", file=sys.stderr, flush=True)


def prepare_streams() -> None:
    """Make the standard streams usable, whatever the caller passed on.

    A closed one is opened on the null device: Python has none then, and the next file to be opened would get
    its number, and what libraries write there. Reading from such a standard input fails. On standard output,
    characters that the encoding lacks are escaped, as Python does on standard error by itself.
    """
    for number, name, access in (
        (0, "stdin", os.O_WRONLY),
        (1, "stdout", os.O_RDWR),
        (2, "stderr", os.O_RDWR),
    ):
        if _is_closed(number):
            _open_null(number, access)
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, access)
            setattr(sys, name, os.fdopen(opened, "r" if number == 0 else "w", encoding="utf-8"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _is_closed(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return True
    return False


def _open_null(number: int, access: int) -> None:
    """Open the null device under this descriptor, also for the processes that this one starts."""
    opened = os.open(os.devnull, access)
    if opened == number:
        os.set_inheritable(number, True)
        return
    os.dup2(opened, number)
    os.close(opened)


def discard_output() -> None:
    """Redirect the rest of standard output to the null device."""
    _open_null(sys.stdout.fileno(), os.O_WRONLY)


def flush_errors() -> None:
    """Flush standard error; redirect it to the null device if it cannot be written.

    Python would flush it again at exit, and a failure there replaces the exit status.
    """
    try:
        sys.stderr.flush()
    except OSError:
        _open_null(sys.stderr.fileno(), os.O_WRONLY)
