"""Claim and record against a database, with 1 to 64 simulated workers: at which number is it the limit?

Each worker makes ``--share`` prompts on a device that sleeps ``--seconds`` a picture. With the most workers
it is tried on faster devices as well, until the database cannot keep up. Then four whole jobs in plain
processes are compared with one. Workers and database share this machine's cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from benchmarks.fleet.crew import Shift
from benchmarks.fleet.processes import pace
from benchmarks.fleet.shown import KEPT_UP
from benchmarks.fleet.sizes import document_sizes
from benchmarks.fleet.trial import attempt, fresh_databases
from benchmarks.fleet.watch import real_mongodb
from benchmarks.places import DATABASES
from benchmarks.results import RESULTS, Check, Result, report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.fleet.trial import Trial

_HOPELESS = 0.8
"""Below it more workers are of no use to anybody."""
_SPEEDUP = 3.6
_PROCESSES = 4


def measure(asked: argparse.Namespace) -> tuple[list[Trial], dict[str, float]]:
    """By database a trial for each number of workers, and with the most of them one for each faster device;
    and the mean bytes of MongoDB's documents.
    """
    until = time.monotonic() + asked.budget
    trials: list[Trial] = []
    sizes: dict[str, float] = {}
    for kind in asked.databases:
        busy = 1.0
        with fresh_databases(kind) as fresh:
            if kind == "mongodb":
                sizes = document_sizes(fresh())
            for workers, faster in _steps(asked):
                if not is_worth_trying(busy, faster) or time.monotonic() > until:
                    break
                trials.append(attempt(kind, workers, _shift(asked, fresh(), faster)))
                busy = trials[-1].busy
                print(f"{kind}, {workers} workers: {trials[-1].seconds:.1f} s", file=sys.stderr)
    return trials, sizes


def is_worth_trying(busy: float, faster: float) -> bool:
    """Say whether more workers, or so much faster devices, can show anything after devices this busy."""
    return busy >= (KEPT_UP if faster > 1 else _HOPELESS)


def result(
    asked: argparse.Namespace, trials: Sequence[Trial], sizes: dict[str, float], ratio: float | None
) -> Result:
    """Return the trials' rows and checks. ``ratio``: of the plain processes; None: left out."""
    return Result(
        benchmark="fleet",
        checks=checks(trials, ratio),
        settings={name: value for name, value in vars(asked).items() if name != "results"},
        rows=[row(trial) for trial in trials],
        note=asked.note,
        details={"bytes a document": sizes},
    )


def _steps(asked: argparse.Namespace) -> list[tuple[int, float]]:
    """So many workers on devices that are so many times as fast."""
    return [(workers, 1.0) for workers in asked.workers] + [(max(asked.workers), f) for f in asked.faster]


def _shift(asked: argparse.Namespace, url: str, faster: float) -> Shift:
    return Shift(
        url=url,
        share=asked.share,
        batch=asked.batch,
        seconds=asked.seconds / faster,
        ramp=asked.ramp / faster,
        limit=asked.limit,
    )


def row(trial: Trial) -> dict[str, Any]:
    """A trial's figures. ``busy`` is the devices' time ÷ all time; the waits are SQLite's, the lost rounds
    MongoDB's.
    """
    log, prompts = trial.log, max(1, trial.recorded)
    claim, record = (_percentiles(log.took.get(name, ())) for name in ("claim", "record"))
    cpu = sum(each.cpu for each in trial.done)
    return {
        "database": _called(trial.database),
        "workers": trial.workers,
        "s a picture": trial.shift.seconds,
        "prompts": trial.recorded,
        "prompts/s": trial.recorded / trial.seconds,
        "busy": trial.busy,
        "claim ms p50": claim[0],
        "p99": claim[1],
        "record ms p50": record[0],
        "p99 ": record[1],
        "twice": trial.twice,
        "claimed again": trial.again,
        "lock waits": log.lock_waits,
        "lost rounds": log.lost_rounds,
        "asked again": log.failed,
        "commands a prompt": len(log.commands) / prompts,
        "lock ms a prompt": 1000 * trial.lock_held,
        "server cpu ms a prompt": 1000 * (trial.server_cpu or 0.0) / prompts,
        "worker cpu ms a prompt": 1000 * cpu / prompts,
    }


def _called(kind: str) -> str:
    if kind == "mongodb":
        return "MongoDB" if real_mongodb() else "SecantusDB (in MongoDB's place)"
    return "SQLite"


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """The median and the 99th percentile, in milliseconds."""
    if len(seconds) < 2:
        return (1000 * sum(seconds), 1000 * sum(seconds))
    cuts = quantiles(seconds, n=100, method="inclusive")
    return 1000 * cuts[49], 1000 * cuts[98]


def checks(trials: Sequence[Trial], faster: float | None) -> list[Check]:
    """Nothing twice and nothing lost; the devices kept busy; and four processes worth 3.6.

    Whether what stands in MongoDB's place keeps up is nobody's target.
    """
    made = [
        Check(
            figure="prompts claimed or drawn twice, or lost, by up to "
            f"{max(each.workers for each in trials)} workers",
            measured=sum(each.twice + each.lost for each in trials),
            target=0,
            at_least=False,
        )
    ]
    slowest = max(each.shift.seconds for each in trials)
    judged = [each for each in trials if each.database == "sqlite" or real_mongodb()]
    for kind in dict.fromkeys(each.database for each in judged):
        most = max(
            (each for each in trials if each.database == kind and each.shift.seconds == slowest),
            key=lambda each: each.workers,
        )
        figure = f"devices busy, {most.workers} workers at {slowest:g} s a picture, {_called(kind)}"
        made.append(Check(figure=figure, measured=most.busy, target=KEPT_UP))
    if faster is not None:
        figure = f"{_PROCESSES} processes with a sleeping engine ÷ one, images/s"
        made.append(Check(figure=figure, measured=faster, target=_SPEEDUP))
    return made


def speedup(prompts: int, seconds: float) -> float | None:
    """How much faster four processes are than one; None where nobody asked."""
    if not prompts:
        return None
    return pace(_PROCESSES, prompts, seconds) / pace(1, prompts, seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, keep; the exit status."""
    asked = parser().parse_args(argv)
    trials, sizes = measure(asked)
    ratio = speedup(asked.prompts, asked.device)
    outcome = result(asked, trials, sizes, ratio)
    print(report(outcome))
    outcome.save(asked.results)
    return outcome.status


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=list(DATABASES))
    parser.add_argument("--share", type=int, default=20, help="prompts of each worker")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.8, help="of a device's time a picture")
    parser.add_argument("--faster", type=float, nargs="*", default=[2, 4, 8], help="at the end")
    parser.add_argument("--ramp", type=float, default=4, help="seconds until the last has begun")
    parser.add_argument("--limit", type=float, default=30, help="seconds of a trial")
    parser.add_argument("--budget", type=float, default=190, help="seconds after which no trial is begun")
    parser.add_argument("--prompts", type=int, default=240, help="of the four processes; 0: leave them out")
    parser.add_argument("--device", type=float, default=0.2, help="their seconds a picture")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--note", default="All workers and the database share the cores with other work.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
