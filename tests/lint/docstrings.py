"""Finds docstrings of the package that do not begin as an imperative sentence, or a class's noun.

ruff's D401 knows verbs by their endings; this adds the words that a clause begins with.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_CLAUSE = re.compile(r"(?:Whether|Of|What|Where|Who|Whoever|How|As|That|If|When|The same)\b")
_LIMITS = re.compile(r"\bKnows? (?:no|nothing|neither|only)\b")


class Finding(NamedTuple):
    """A line of a module, and why it is refused."""

    line: int
    reason: str


def findings(source: str, *, room: bool = False) -> Iterator[Finding]:
    """Yield the docstrings that begin with a clause, and those that say what a module does not know.

    ``room``: the source is a package's ``__init__``, which may say so of the whole room.
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        text = ast.get_docstring(node)
        if text is None:
            continue
        line = node.body[0].lineno
        if isinstance(node, ast.FunctionDef) and (clause := _CLAUSE.match(text)):
            yield Finding(line, f"begins with {clause[0]!r}: say in the imperative what the function does")
        if _LIMITS.search(text) and not (room and isinstance(node, ast.Module)):
            yield Finding(line, "says what it does not know: import-linter holds that; say what it does")
