"""No code of a model's own is ever run: every call that loads one says so."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "text2img"
LOADERS = ("from_pretrained", "from_pipe")


def _calls():
    """Yield each call of a loader in the package, with its file and line."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in LOADERS:
                yield pytest.param(node, id=f"{path.relative_to(PACKAGE)}:{node.lineno}")


def _forbids(keyword: ast.keyword) -> bool:
    is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
    return keyword.arg == "trust_remote_code" and is_false


CALLS = list(_calls())


@pytest.mark.parametrize("call", CALLS)
def test_every_loader_forbids_remote_code(call):
    """The argument is there, as a constant that nothing can change."""
    assert any(map(_forbids, call.keywords))


def test_the_calls_are_found():
    """The check would pass if it found none."""
    files = {call.id.partition(":")[0] for call in CALLS}
    assert {"engine/loading.py", "evaluation/clip.py"} <= files


def test_nothing_asks_to_trust():
    """Nowhere in the package is remote code trusted."""
    for path in PACKAGE.rglob("*.py"):
        assert "trust_remote_code=True" not in path.read_text(encoding="utf-8"), path
