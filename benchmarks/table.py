"""The tables of figures in docs/, from the JSON files: ``python -m benchmarks.table`` prints them.

``--write`` puts them into their pages, each between its marks; tests/benchmarks/test_table.py compares them.
The README's few figures are written by hand; the same test compares them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.fleet.shown import fleet
from benchmarks.results import RESULTS, read, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

DOCS = Path(__file__).parents[1] / "docs"
SPEED_PAGE = DOCS / "benchmarks.md"
FLEET_PAGE = DOCS / "scale.md"
BEGIN = "<!-- speed: printed by python -m benchmarks.table -->\n"
END = "<!-- end of speed -->"
FLEET_BEGIN = "<!-- fleet: printed by python -m benchmarks.table -->\n"
FLEET_END = "<!-- end of fleet -->"
_ELSEWHERE = frozenset({"approximations", "marking", "watermark"})
"""Shown in docs/approximations.md, docs/marking.md and docs/decisions/watermark.md."""


def block(results: Path = RESULTS) -> str:
    """The table, a line for each check of each result, and where and when they were measured.

    Raises ValueError for a rehearsal, which is no result.
    """
    files = [file for file in sorted(results.glob("*.json")) if file.stem not in _ELSEWHERE]
    documents = [read(file) for file in files]
    for document in documents:
        if document["rehearsal"]:
            raise ValueError(f"{document['benchmark']} is a rehearsal, and no result")
    rows = [row for document in documents for row in _rows(document)]
    if not rows:
        return "Nothing has been measured.\n"
    return f"{table(rows)}\n\n{'; '.join(_places(documents))}.\n"


def _rows(document: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for check in document["checks"]:
        yield {
            "figure": check.figure,
            "target": check.target_shown,
            "measured": check.measured_shown + ("" if check.met else " (missed)"),
            "command": f"`python -m benchmarks.{document['benchmark']}`",
        }


def _places(documents: Iterable[Mapping[str, Any]]) -> list[str]:
    """Which of them were measured where and when."""
    places: dict[str, list[str]] = {}
    for each in documents:
        where = f"{each['date']}, {each['machine']}, commit {each['commit']}"
        places.setdefault(where, []).append(each["benchmark"])
    return [f"{', '.join(names)}: {where}" for where, names in places.items()]


def fleet_block(results: Path = RESULTS) -> str:
    """The table of benchmarks.fleet's trials, and what follows from them."""
    file = results / "fleet.json"
    return fleet(read(file)) if file.exists() else "Nothing has been measured.\n"


def placed(text: str, fresh: str, begins: str = BEGIN, ends: str = END) -> str:
    """Return a page's text with a table in its place. Raises ValueError where it has no marks."""
    before, begin, rest = text.partition(begins)
    _, end, after = rest.partition(ends)
    if not begin or not end:
        raise ValueError(f"the page lacks {begins.strip()} … {ends}")
    return before + begin + fresh + end + after


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, or write them into their pages."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put them into docs/")
    asked = parser.parse_args(argv)
    if asked.write:
        speed = placed(SPEED_PAGE.read_text(encoding="utf-8"), block())
        trials = placed(FLEET_PAGE.read_text(encoding="utf-8"), fleet_block(), FLEET_BEGIN, FLEET_END)
        SPEED_PAGE.write_text(speed, encoding="utf-8")
        FLEET_PAGE.write_text(trials, encoding="utf-8")
    else:
        print(f"{block()}\n{fleet_block()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
