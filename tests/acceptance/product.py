"""Starts the product as its users do, in a clean environment and an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "text2img" / "demo" / "model"
_KEPT = ("PATH", "LANG", "LD_LIBRARY_PATH", "TMPDIR")


def run(*arguments: str, folder: Path, timeout: float = 120, stdin: str | None = None, **variables: str):
    """The finished process; its output as text. Nothing of the caller's configuration reaches it."""
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(folder, **variables),
        timeout=timeout,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


@contextmanager
def running(*arguments: str, folder: Path, **variables: str):
    """The process, which somebody may do something to; killed at the end of the block if it still lives.

    Its output are two pipes of text: what writes more than they hold must be read along.
    """
    with subprocess.Popen(
        command(*arguments),
        cwd=folder,
        env=environment(folder, **variables),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "main.py"), *arguments]


def environment(folder: Path, **variables: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return {**kept, "HOME": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}


def errors(finished) -> list[str]:
    """The lines of standard error."""
    return finished.stderr.strip().splitlines()


def soon() -> float:
    """Seconds: the eight in which a run that was asked to end does so, where no more processes than there are
    cores want to run; where there are more, as many times as long.
    """
    cores = os.cpu_count() or 1
    testing = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return 8 * max(1, testing / cores, os.getloadavg()[0] / cores)
