"""Starts the product as its users do, in a clean environment and an empty folder.

``run`` and ``running`` start ``python main.py``. Where the engine is not the subject of a test, it uses those
of ``sleeping``, which start the same product with an engine that sleeps (``tests/fakes/sleeping.py``).
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from text2img.databases import Collections, open_database
from text2img.intake import read_prompts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "text2img" / "demo" / "model"
SCENE = "a large red circle on a blue background"
HANG = 250
"""Seconds after which a process counts as hung; no test waits so long for one that works."""
GRACE_EXCEEDED = "shutdown grace period ("
"""Words of a log, only where a run that was asked to end had to be cut off."""
_KEPT = ("PATH", "LANG", "LD_LIBRARY_PATH", "TMPDIR")


@dataclass(frozen=True)
class Product:
    """A way to start the product: the script that stands for ``main.py``."""

    script: Path

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(self.script), *arguments]

    def run(
        self, *arguments: str, folder: Path, timeout: float = HANG, stdin: str | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """The finished process; its output as text. Nothing of the caller's configuration reaches it."""
        return subprocess.run(
            self.command(*arguments),
            cwd=folder,
            env=environment(folder, **variables),
            timeout=timeout,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )

    @contextmanager
    def running(self, *arguments: str, folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
        """The process, for a test to act on while it runs; killed at the end of the block if it still lives.

        Its output are two pipes of text: what writes more than they hold must be read along.
        """
        with subprocess.Popen(
            self.command(*arguments),
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


drawing = Product(ROOT / "main.py")
sleeping = Product(ROOT / "tests" / "fakes" / "sleeping.py")
run, running, command = drawing.run, drawing.running, drawing.command


def run_each(
    commands: Sequence[Sequence[str]], folder: Path, **variables: str
) -> list[subprocess.CompletedProcess[str]]:
    """Run the real product once for each of the command lines, in folders ``0``, ``1``, … within that one.

    Each is a process of its own, but they share what Python imports, which is most of what they cost.
    """
    cases = []
    for number, arguments in enumerate(commands):
        place = folder / str(number)
        place.mkdir(exist_ok=True)
        named = environment(place, **variables)
        cases.append({"arguments": arguments, "folder": str(place), "environment": named})
    each = [sys.executable, str(ROOT / "tests" / "fakes" / "each.py")]
    done = subprocess.run(
        each, input=json.dumps(cases), env=environment(folder), timeout=HANG, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return [subprocess.CompletedProcess(arguments, *one) for arguments, one
            in zip(commands, json.loads(done.stdout), strict=True)]  # fmt: skip


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """The variables of a started process: a few of this one's, and those given."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return {**kept, "HOME": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}


def add(folder: Path, *prompts: str | Mapping[str, object]) -> None:
    """Put prompts, texts or a file's entries, into the folder's ``prompts.db``, without a process for it.

    The database is created if it does not exist, also for no prompts.
    """
    entries = [{"text": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, entries)))
    with closing(open_database(f"sqlite:///{folder}/prompts.db", Collections())) as database:
        assert not entries or database.runs.enqueue(read_prompts(str(file))) == len(entries)
    file.unlink()


def counts(folder: Path) -> dict[str, int]:
    """Return how many prompts of the folder's ``prompts.db`` there are of each status that any has."""
    with closing(sqlite3.connect(folder / "prompts.db", timeout=60)) as database:
        return dict(database.execute("SELECT status, count(*) FROM datasets GROUP BY status"))


def errors(finished) -> list[str]:
    """The lines of standard error."""
    return finished.stderr.strip().splitlines()
