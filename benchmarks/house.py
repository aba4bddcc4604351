"""How readable the package is, in figures: ``python -m benchmarks.house``, with ``--list`` what each counts.

- *entries*: what stands at the top of ``text2img/``;
- *modules*: Python files of the package;
- *small modules*: those under 100 lines that a single other module of the package imports;
- *files of a run*: files of the package of which a plain run calls a function (SQLite, a folder, the demo
  model, one prompt), in any thread; what runs at import is not counted;
- *old words*: words that the style of this project avoids (``OLD_WORDS``), in code, comments and docstrings;
- *__getattr__ in classes*: attributes that no reader can look up.

Each has a goal; exit status 1 while one is missed.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.results import table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import FrameType

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "text2img"
SMALL = 100  # lines
OLD_WORDS = re.compile(
    r"\b(whoever|nobody|somebody|anybody|lest|anew|for ever|shall|meanwhile|in vain|heeds?|heeded|kin"
    r"|at the most|so many|so long|told|tells?|said|says?|heard|hears?|speaks?"
    r"|knows? (?:no|nothing|neither)|stands?|stood|patience|sentences?|be they)\b",
    re.IGNORECASE,
)
"""Actors without a name, archaisms, and everyday verbs where the field has a term of its own."""


class Figure(NamedTuple):
    """A figure, its goal (at most), and what was counted."""

    name: str
    goal: int
    items: list[str]


def modules() -> dict[str, Path]:
    """Return the package's modules by their dotted names."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: Mapping[str, Path]) -> set[str]:
    """Return which of the known modules a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(known)


def entries() -> list[str]:
    """Return what stands at the top of the package, as git knows it."""
    return sorted({name.split("/")[1] for name in _tracked()})


def small_modules(known: Mapping[str, Path]) -> list[str]:
    """Return the modules under 100 lines, with the one module that imports each."""
    importers: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for imported in imports(path, known) - {name}:
            importers[imported].add(name)
    return [
        f"{name} ({lines} lines, for {next(iter(importers[name]))})"
        for name, path in known.items()
        if path.name != "__init__.py"
        and (lines := len(path.read_text(encoding="utf-8").splitlines())) < SMALL
        and len(importers[name]) == 1
    ]


def old_words() -> list[str]:
    """Return each use of an old word as ``file:line: word``."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {word[0]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for word in OLD_WORDS.finditer(line)
    ]


def attribute_hooks(known: Mapping[str, Path]) -> list[str]:
    """Return the classes that define ``__getattr__``."""
    return [
        f"{name}.{node.name}"
        for name, path in known.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        and any(isinstance(each, ast.FunctionDef) and each.name == "__getattr__" for each in node.body)
    ]


def files_of_a_run() -> list[str]:
    """Return the files whose functions a plain run calls; raises RuntimeError where the run fails."""
    with tempfile.TemporaryDirectory() as folder:
        job = ("--database", "sqlite:///prompts.db", "--log-level", "ERROR")
        where = ("--output", "images", "--model-id", str(PACKAGE / "demo" / "model"))
        Path(folder, "prompts.txt").write_text("a large red circle on a white background\n", encoding="utf-8")
        _run(folder, [str(ROOT / "main.py"), "enqueue", "prompts.txt", *job])
        traced = Path(folder, "files")
        _run(folder, ["-m", "benchmarks.house", "--trace", str(traced), "run", *job, *where])
        return traced.read_text(encoding="utf-8").splitlines()


def trace(into: Path, arguments: Sequence[str]) -> int:
    """Run the command line in this process, and write down the files whose functions were called."""
    files: set[str] = set()

    def called(frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        # A function's code is optimised; the body of a module or a class is not.
        if event == "call" and code.co_flags & 1 and not code.co_name.startswith("<"):
            files.add(code.co_filename)

    from text2img import cli

    threading.setprofile(called)
    sys.setprofile(called)
    try:
        status = cli.main(list(arguments))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        own = sorted(os.path.relpath(name, ROOT) for name in files if name.startswith(str(PACKAGE)))
        into.write_text("\n".join(own), encoding="utf-8")
    return status


def figures() -> Iterator[Figure]:
    """Measure all; the run of the demo model takes half a minute."""
    known = modules()
    yield Figure("entries at the top of text2img/", 19, entries())
    yield Figure("modules", 130, list(known))
    yield Figure("modules under 100 lines with a single importer", 5, small_modules(known))
    yield Figure("files of which a plain run calls a function", 50, files_of_a_run())
    yield Figure("old words", 20, old_words())
    yield Figure("__getattr__ in classes", 0, attribute_hooks(known))


def _tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "text2img"],  # noqa: S607 - whichever git the developer uses
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return listed.stdout.split()


def _run(folder: str, arguments: Sequence[str]) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"the run ended with status {finished.returncode}: {finished.stderr[-1000:]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, with ``--list`` what was counted, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.house", description=__doc__)
    parser.add_argument("--list", action="store_true", help="also print what each figure counts")
    parser.add_argument("--trace", type=Path, help=argparse.SUPPRESS)
    asked, rest = parser.parse_known_args(argv)
    if asked.trace:
        return trace(asked.trace, rest)
    measured = list(figures())
    if asked.list:
        for each in measured:
            print(f"{each.name}:", *each.items, sep="\n  ")
    rows = [{"figure": each.name, "is": len(each.items), "goal": f"≤ {each.goal}"} for each in measured]
    print(table(rows))
    return 1 if any(len(each.items) > each.goal for each in measured) else 0


if __name__ == "__main__":
    sys.exit(main())
