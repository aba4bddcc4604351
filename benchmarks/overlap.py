"""Does the device ever wait? The job, far from its servers, against a loop that has nothing else to do.

The engine sleeps as one does that waits for a GPU, and gives 512² pictures that cost what photographs cost
to encode. The job works on servers of MongoDB's and Cloud Storage's protocols behind proxies that put 20 ms
and 150 ms before them; the bare loop gives the same batches to the same engine and throws the pictures away;
the serial script works on the same servers, one prompt after another. All take turns, ``--rounds`` times.

Pictures a second are counted from the first batch's start until everything is recorded and the job is over,
so that a backlog cannot hide.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.contestants import Pace, Task, bare_loop, job, serial_script
from benchmarks.job import apart
from benchmarks.places import places
from benchmarks.results import RESULTS, Check, Result, report

if TYPE_CHECKING:
    from collections.abc import Sequence

DATABASE_SECONDS, STORAGE_SECONDS = 0.020, 0.150
_SERIAL_SHARE = 10  # the serial script is slow and does nothing new after its first prompts


@dataclass(frozen=True, slots=True)
class Round:
    """One turn of all three."""

    bare: Pace
    job: Pace
    serial: Pace


def measure(task: Task, rounds: int, more: Sequence[str]) -> list[Round]:
    """Let the three make the task's pictures in turn. ``more`` are further arguments of the job."""
    turns = []
    with places(
        "mongodb", "bucket", database_seconds=DATABASE_SECONDS, storage_seconds=STORAGE_SECONDS
    ) as place:
        for _ in range(rounds):
            for_job, for_script = place(), place()
            for_job.add(task.pictures)
            few = replace(task, pictures=max(5, task.pictures // _SERIAL_SHARE))
            for_script.add(few.pictures)
            turns.append(
                Round(
                    apart(bare_loop, task),
                    apart(job, task, for_job, *more),
                    apart(serial_script, few, for_script),
                )
            )
    return turns


def result(task: Task, turns: Sequence[Round], more: Sequence[str]) -> Result:
    """The ratios, each within its round, and their medians against the targets."""
    rows = [
        {
            "round": number,
            "bare loop images/s": turn.bare.done,
            "job images/s": turn.job.done,
            "serial script images/s": turn.serial.done,
            "job ÷ bare loop": turn.job.done / turn.bare.done,
            "the same, to the last batch's end": turn.job.device / turn.bare.device,
            "job ÷ serial script": turn.job.done / turn.serial.done,
            "job's start, s": turn.job.start,
        }
        for number, turn in enumerate(turns, 1)
    ]
    return Result(
        benchmark="overlap",
        checks=[
            Check(figure="job ÷ bare loop, images/s", measured=_median(rows, "job ÷ bare loop"), target=0.95),
            Check(
                figure="job ÷ plain serial script, images/s",
                measured=_median(rows, "job ÷ serial script"),
                target=2.0,
            ),
        ],
        settings={
            "pictures": task.pictures,
            "batch": task.batch,
            "side": task.side,
            "device seconds a picture": task.seconds,
            "storage latency s": STORAGE_SECONDS,
            "database latency s": DATABASE_SECONDS,
            "job's further arguments": list(more),
        },
        rows=rows,
        note="Medians of the rounds. Servers and proxies share the cores with the job, as does other work.",
    )


def _median(rows: Sequence[dict[str, Any]], name: str) -> float:
    return median(float(row[name]) for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, keep; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--seconds", type=float, default=0.1, help="of the device's time a picture")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("more", nargs="*", help="after --: further arguments of the job")
    asked = parser.parse_args(argv)
    task = Task(pictures=asked.pictures, batch=asked.batch, side=asked.side, seconds=asked.seconds)
    outcome = result(task, measure(task, asked.rounds, asked.more), asked.more)
    print(report(outcome))
    outcome.save(asked.results)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
