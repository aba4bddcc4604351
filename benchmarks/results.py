"""What a benchmark has measured: its checks against their targets, a table for people, JSON for the rest.

Knows the machine in general words, the versions and the commit; does not know what was measured.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "diffusers", "transformers", "pymongo", "google-cloud-storage", "pillow", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One figure and what it has to reach: at least ``target``, or at most with ``at_least`` False."""

    figure: str
    measured: float
    target: float
    at_least: bool = True
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the target is reached; a figure that is not a number reaches none."""
        return self.measured >= self.target if self.at_least else self.measured <= self.target

    @property
    def target_shown(self) -> str:
        """The target as tables show it."""
        return f"{'≥' if self.at_least else '≤'} {shown(self.target, self.unit)}"

    @property
    def measured_shown(self) -> str:
        """The figure as tables show it."""
        return shown(self.measured, self.unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A benchmark's outcome. ``settings`` is what it was run with, ``rows`` what it saw, one by one.

    ``note`` says what a reader must know to judge the figures; ``rehearsal`` marks what is no result.
    """

    benchmark: str
    checks: Sequence[Check]
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    note: str
    chip: str | None = None
    rehearsal: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> int:
        """The exit status: 0 where every target is reached, else 1; a rehearsal has nothing to reach."""
        return 0 if self.rehearsal or all(check.met for check in self.checks) else 1

    def save(self, folder: Path = RESULTS) -> Path:
        """Write the result, whole or not at all; returns the file."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.benchmark}.json"
        half = file.with_suffix(".part")
        half.write_text(json.dumps(self._document(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        half.replace(file)
        return file

    def _document(self) -> dict[str, Any]:
        checks = [{**asdict(check), "met": check.met} for check in self.checks]
        return {
            "benchmark": self.benchmark,
            "rehearsal": self.rehearsal,
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "machine": machine(self.chip),
            "load": os.getloadavg(),
            "priority": priority(),
            "note": self.note,
            "commit": commit(),
            "python": platform.python_version(),
            "versions": versions(),
            "settings": dict(self.settings),
            "checks": checks,
            "rows": [dict(row) for row in self.rows],
            **self.details,
        }


def read(file: Path) -> dict[str, Any]:
    """A result that was saved, its checks as Check."""
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for each in document["checks"]:
        del each["met"]
    document["checks"] = [Check(**each) for each in document["checks"]]
    return document


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys as a Markdown table; numbers stand to the right."""
    head = list(rows[0])
    cells = [[shown(row[name]) for name in head] for row in rows]
    rule = ["--:" if isinstance(rows[0][name], int | float) else "---" for name in head]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *cells])


def report(result: Result) -> str:
    """All that is printed of a result: its rows, and how each check came out."""
    lines = [table(result.rows), ""] if result.rows else []
    for check in result.checks:
        verdict = "rehearsed" if result.rehearsal else "reached" if check.met else "MISSED"
        lines.append(f"{verdict}: {check.figure}: {check.measured_shown} (target {check.target_shown})")
    return "\n".join([*lines, result.note])


def shown(value: object, unit: str = "") -> str:
    """A number with three significant digits at least, anything else as text."""
    if isinstance(value, float):
        value = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value}{unit and ' '}{unit}"


def machine(chip: str | None = None) -> str:
    """The machine in general words: cores that this process may use, architecture, memory, chip."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cores} cores, {platform.machine()}, {memory:.0f} GiB, {chip or 'no GPU used'}"


def priority() -> str:
    """This process's nice value, and that of its session's scheduling group (sched(7), autogroups)."""
    group = ""
    with suppress(OSError):
        group = Path("/proc/self/autogroup").read_text(encoding="utf-8").partition(" ")[2].strip()
    return f"nice {os.nice(0)}" + (f", its session's group {group}" if group else "")


def versions() -> dict[str, str]:
    """The versions of what could matter for speed."""
    known = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            known[name] = version(name)
    return known


def commit() -> str | None:
    """The commit that is checked out, with a + where files differ from it; None outside a checkout."""
    head = _git("rev-parse", "--short=12", "HEAD")
    beside = (":/", ":(exclude,top)benchmarks/results")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *beside)
    return head and head + ("" if changed == "" else "+")


def _git(*arguments: str) -> str | None:
    program = shutil.which("git")
    if program is None:
        return None
    done = subprocess.run(
        [program, *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None
