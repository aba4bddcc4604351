"""Do four workers make four times as much? ``run --workers 4`` against ``run --workers 1``, by Ray.

Each worker's engine sleeps as one does that waits for a GPU of its own, so that the figure shows what sharing
costs: one database, one claim, one process that hears of everything. Pictures are small, since a real machine
with four GPUs has more cores than the one that measures. Pictures a second are the run's own, from the first
batch's start (of whichever worker) to the last record.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks.job import clean_environment
from benchmarks.results import RESULTS, Check, Result, report
from text2img.databases import Collections, NewPrompt, open_database
from text2img.prompts import PromptId, RequestedParameters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ROOT = Path(__file__).parents[1]
_BATCH = 2


def pace(workers: int, pictures: int, seconds: float) -> float:
    """Pictures a second of one run with so many workers, each of which sleeps ``seconds`` a picture.

    Raises RuntimeError where the run does not make them all.
    """
    with TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/prompts.db"
        with closing(open_database(url, Collections())) as database:
            database.runs.enqueue(
                NewPrompt(id=PromptId("int", str(number)), text="a boat", requested=RequestedParameters())
                for number in range(1, pictures + 1)
            )
            job = ("--database", url, "--output", "pictures", "--batch-size", str(_BATCH))
            finished = subprocess.run(
                [sys.executable, "-m", "tests.fakes.sleeping", "run", *job, "--workers", str(workers)],
                cwd=folder,
                env={**clean_environment(), "PYTHONPATH": str(_ROOT), "SLEEP_PER_IMAGE": str(seconds)},
                capture_output=True,
                text=True,
                check=False,
            )
            (run,) = database.runs.last_runs(1)
    if (finished.returncode, run.completed) != (0, pictures):
        raise RuntimeError(f"the run ended with status {finished.returncode}: {finished.stderr[-1000:]}")
    return run.images_per_second


def measure(workers: int, pictures: int, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Each round's pace of one worker and of several, each of which makes so many pictures."""
    rows = []
    for number in range(1, rounds + 1):
        one, several = pace(1, pictures, seconds), pace(workers, workers * pictures, seconds)
        rows.append({"round": number, "one": one, "several": several, "several ÷ one": several / one})
    return rows


def result(workers: int, pictures: int, seconds: float, rows: Sequence[Mapping[str, Any]]) -> Result:
    """The median of the rounds' ratios against the target."""
    return Result(
        benchmark="workers",
        checks=[
            Check(
                figure=f"{workers} workers ÷ one, images/s",
                measured=median(float(row["several ÷ one"]) for row in rows),
                target=0.9 * workers,
            )
        ],
        settings={
            "workers": workers,
            "pictures a worker": pictures,
            "batch": _BATCH,
            "device seconds a picture": seconds,
            "cores": os.cpu_count(),
        },
        rows=rows,
        note="Medians of the rounds. Images/s, each worker with a device of its own that sleeps.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, keep; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workers", description=__doc__)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=100, help="for each worker")
    parser.add_argument("--seconds", type=float, default=0.5, help="of the device's time a picture")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(argv)
    rows = measure(asked.workers, asked.pictures, asked.seconds, asked.rounds)
    outcome = result(asked.workers, asked.pictures, asked.seconds, rows)
    print(report(outcome))
    outcome.save(asked.results)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
