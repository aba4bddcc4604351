"""Search for inputs that break a property: ``python -m tests.fuzz [MINUTES]``.

Runs every property-based and state-machine test with the profile ``fuzz``, in rounds of new random examples,
until MINUTES have passed or a round fails. The failing examples are printed, and Hypothesis keeps them in
.hypothesis, so that the next search begins with them.
"""

from __future__ import annotations

import itertools
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 5
    files = [str(path) for path in sorted(HERE.rglob("test_*.py")) if "hypothesis" in path.read_text("utf-8")]
    end = time.monotonic() + 60 * minutes
    for number in itertools.count(1):
        seed = secrets.randbelow(2**32)
        print(f"round {number}: --hypothesis-seed={seed}", flush=True)  # noqa: T201
        if status := _round(seed, files):
            return status
        if time.monotonic() >= end:  # clock: how long to search; no test depends on it
            return 0
    raise AssertionError


def _round(seed: int, files: list[str]) -> int:
    """Run each test once; returns pytest's exit status."""
    chosen = ["-m", "hypothesis or fuzz", f"--hypothesis-seed={seed}"]
    # The suite's own limit would end a search on a busy machine, and look like a finding.
    shared = [
        "--numprocesses",
        "auto",
        "--dist",
        "load",
        "--timeout=3600",
    ]
    command = [sys.executable, "-m", "pytest", *chosen, *shared, *files]
    return subprocess.run(command, env={**os.environ, "HYPOTHESIS_PROFILE": "fuzz"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
