"""What the test suites cost: tests, processor seconds and wall seconds of each.

    python -m benchmarks.suites                       # each folder of tests/, and the two commands
    python -m benchmarks.suites test --times 3 --busy 2

``--busy`` runs that many endless loops beside the tests, to show that the suites hold on a machine that is
busy with other things. Processor seconds are user and system time of pytest and of every process that it
started and that has ended; a RabbitMQ, which runs detached, is not in them. Exit status 1 when a test failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.results import table

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[1]
_XDIST = (
    "--numprocesses",
    "auto",
    "--dist",
    "loadfile",
    "--no-loadscope-reorder",
    "--max-worker-restart",
    "0",
)
SUITES = {
    **{
        name: (f"tests/{name}",)
        for name in ("unit", "contract", "engine", "evaluation", "acceptance", "chaos", "benchmarks")
    },
    "test": ("-m", "not full"),
    "test-all": (),
}
"""What pytest is given for each suite; the last two are ``make test`` and ``make test-all``."""
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|error|errors)\b")


@dataclass(frozen=True, slots=True)
class Cost:
    """One run of a suite. ``tests`` counts outcomes by pytest's words; times are in seconds."""

    tests: dict[str, int]
    processor: float
    wall: float


def counts(output: str) -> dict[str, int]:
    """Return the numbers of pytest's last line by its words, such as ``{"passed": 12, "skipped": 1}``."""
    lines = output.strip().splitlines()
    return {word: int(number) for number, word in _COUNT.findall(lines[-1] if lines else "")}


def measure(arguments: Sequence[str]) -> Cost:
    """Run pytest with the arguments, as the Makefile does, and return what it cost."""
    before, begun = os.times(), time.monotonic()
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *_XDIST, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    after, ended = os.times(), time.monotonic()
    tests = counts(finished.stdout)
    if finished.returncode:
        print(finished.stdout)
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(tests, processor, ended - begun)


def row(name: str, cost: Cost) -> dict[str, str]:
    """Return one line of the table."""
    shown = ", ".join(f"{number} {word}" for word, number in cost.tests.items())
    return {
        "suite": name,
        "tests": shown,
        "processor s": f"{cost.processor:.0f}",
        "wall s": f"{cost.wall:.0f}",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the suites that were asked for, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default: all")
    parser.add_argument("--times", type=int, default=1, help="runs of each (default: 1)")
    parser.add_argument("--busy", type=int, default=0, help="endless loops beside them (default: 0)")
    asked = parser.parse_args(argv)
    if unknown := set(asked.suites) - set(SUITES):
        parser.error(f"no suite is called {', '.join(sorted(unknown))}")
    rows, failed = [], False
    with ExitStack() as stack:
        for _ in range(asked.busy):
            loop = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(loop.kill)
        for name in asked.suites or SUITES:
            for _ in range(asked.times):
                cost = measure(SUITES[name])
                failed |= bool({"failed", "error", "errors"} & set(cost.tests)) or "passed" not in cost.tests
                rows.append(row(name, cost))
                print(" · ".join(rows[-1].values()), flush=True)
    print(f"\n{table(rows)}\n{asked.busy} busy loops beside; {os.cpu_count()} cores")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
