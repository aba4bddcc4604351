"""How long a process takes that has little to do: help, a wrong option, a run with nothing pending.

Each command is started ``--starts`` times, all in turn, beside an interpreter that does nothing; once more
each under ``-X importtime``, which counts the modules and says whether torch was among them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.job import clean_environment
from benchmarks.results import RESULTS, Check, Result, report
from text2img.databases import Collections, open_database

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAIN = str(Path(__file__).parents[1] / "main.py")
_HEAVY = ("torch", "diffusers", "transformers")


@dataclass(frozen=True, slots=True)
class Start:
    """A command, the exit status it should have, and its target in seconds (None: for comparison)."""

    name: str
    arguments: tuple[str, ...]
    status: int
    target: float | None


@dataclass(frozen=True, slots=True)
class Seen:
    """What was measured of a command: the seconds of each start, its modules, the heavy ones by name."""

    start: Start
    seconds: Sequence[float]
    modules: int
    heavy: Sequence[str]


def starts(folder: Path) -> list[Start]:
    """What is measured; ``folder`` holds an empty SQLite database for the run with nothing to do."""
    with closing(open_database(f"sqlite:///{folder}/empty.db", Collections())):
        pass  # opening creates it; a run does not
    idle = (_MAIN, "run", "--database", f"sqlite:///{folder}/empty.db", "--output", str(folder / "pictures"))
    return [
        Start("python -c pass", ("-c", "pass"), 0, None),
        Start("--version", (_MAIN, "--version"), 0, 0.1),
        Start("--help", (_MAIN, "--help"), 0, 0.1),
        Start("a wrong option", (_MAIN, "run", "--no-such-option"), 2, 0.3),
        Start("a run with nothing to do", idle, 0, 1.0),
    ]


def seconds(start: Start, folder: Path) -> float:
    """How long the command takes, from its start to its end. Raises RuntimeError where it ends otherwise."""
    begun = time.perf_counter()
    _run(start, folder)
    return time.perf_counter() - begun


def imported(start: Start, folder: Path) -> tuple[int, list[str]]:
    """How many modules the command imports, and which of the heavy ones. Raises as ``seconds`` does."""
    lines = _run(start, folder, "-X", "importtime").stderr.splitlines()
    modules = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    return len(modules), [name for name in _HEAVY if name in modules]


def _run(start: Start, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *flags, *start.arguments],
        cwd=folder,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != start.status:
        raise RuntimeError(f"{start.name} ended with status {done.returncode}: {done.stderr[-500:]}")
    return done


def measure(times: int) -> list[Seen]:
    """All commands ``times`` times in turn; the first turn, which may fill caches, is not counted."""
    with tempfile.TemporaryDirectory(prefix="text2img-") as name:
        folder = Path(name)
        took: dict[Start, list[float]] = {start: [] for start in starts(folder)}
        for turn in range(times + 1):
            for start in took:
                took[start] += [seconds(start, folder)] * (turn > 0)
        return [Seen(start, each, *imported(start, folder)) for start, each in took.items()]


def result(times: int, seen: Sequence[Seen]) -> Result:
    """The medians against their targets, and the heavy imports, of which there should be none."""
    rows = [
        {
            "command": each.start.name,
            "median s": median(each.seconds),
            "least s": min(each.seconds),
            "most s": max(each.seconds),
            "modules": each.modules,
            "heavy": ", ".join(each.heavy) or "none",
        }
        for each in seen
    ]
    checks = [
        Check(
            figure=each.start.name,
            measured=median(each.seconds),
            target=each.start.target,
            at_least=False,
            unit="s",
        )
        for each in seen
        if each.start.target is not None
    ]
    heavy = sum(len(each.heavy) for each in seen)
    figure = "torch, diffusers and transformers among their imports"
    return Result(
        benchmark="coldstart",
        checks=[*checks, Check(figure=figure, measured=heavy, target=0, at_least=False)],
        settings={"starts": times, "database": "sqlite"},
        rows=rows,
        note="Medians of process starts, files in the system's cache; the cores are shared with other work.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, keep; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coldstart", description=__doc__)
    parser.add_argument("--starts", type=int, default=20, help="of each command")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(argv)
    outcome = result(asked.starts, measure(asked.starts))
    print(report(outcome))
    outcome.save(asked.results)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
