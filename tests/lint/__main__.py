"""Prints what tests and docstrings have to change; exit status 1 where there is anything."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.lint import clocks, docstrings

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Print all findings; return the exit status."""
    tests, package = (sorted((ROOT / name).rglob("*.py")) for name in ("tests", "text2img"))
    found = [(path, clocks.findings(path.read_text(encoding="utf-8"))) for path in tests]
    for path in package:
        room = path.name == "__init__.py"
        found.append((path, docstrings.findings(path.read_text(encoding="utf-8"), room=room)))
    lines = [
        f"{path.relative_to(ROOT)}:{finding.line}: {finding.reason}" for path, its in found for finding in its
    ]
    summary = f"{len(tests)} test modules depend on no clock; {len(package)} modules have plain docstrings"
    print("\n".join(lines) or summary)  # noqa: T201
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
