"""ARCHITECTURE.md names what is there: each room, and each module, class and function of the walk."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`(text2img(?:\.\w+)+)`", PAGE)))


def _resolve(name):
    """Return the object of a dotted name: the longest part that is a module, and attributes of it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        return found
    raise LookupError(name)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_exists(name):
    """A reader finds every dotted name of the page in the code."""
    assert _resolve(name) is not None


def test_each_room_has_its_row():
    """The table has all entries of the package, and no others."""
    rows = set(re.findall(r"^\| `text2img/(\w+)(?:/|\.py)`", PAGE, re.MULTILINE))
    package = ROOT / "text2img"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    assert rows == rooms | {
        path.stem for path in package.glob("*.py") if path.stem not in {"__init__", "__main__"}
    }


def test_each_path_exists():
    """A reader finds every path of the page."""
    for path in re.findall(r"`((?:text2img|tests)/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
