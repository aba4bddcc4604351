"""Prints what the test suite's own code has to change; exit status 1 where there is anything."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.lint.clocks import findings

ROOT = Path(__file__).parents[2]


def main() -> int:
    paths = [ROOT / name for name in sys.argv[1:]] or sorted((ROOT / "tests").rglob("*.py"))
    lines = [
        f"{path.relative_to(ROOT)}:{finding.line}: {finding.reason}"
        for path in paths
        for finding in findings(path.read_text(encoding="utf-8"))
    ]
    print("\n".join(lines) if lines else f"{len(paths)} test modules depend on no clock")  # noqa: T201
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
