"""``python -m benchmarks.gpu``: what one GPU makes of SD 1.5 and SDXL, plain, by the engine, by the job.

Each figure is measured by a process of its own, the needed ones before the optional ones; the JSON is
written after each. What no time is left for is listed as skipped. ``--rehearse`` runs the same script with
tiny models on the processor: its figures mean nothing, and it is never kept as a result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.checks import checks
from benchmarks.gpu.task import Task, missing
from benchmarks.results import RESULTS, Result, report
from text2img.engine.devices import check_device
from text2img.errors import DeviceFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROOT = Path(__file__).parents[2]
_LEAST = 20.0  # seconds: with less left, nothing more is begun


@dataclass(frozen=True, slots=True)
class Figure:
    """What one process measures: its function in ``measures``, and its task. ``needs`` are engine options."""

    measure: str
    task: Task
    needs: tuple[str, ...] = ()


Run = Callable[[Figure, float], tuple[list[dict[str, Any]], str | None]]
"""Measures a figure within so many seconds; returns its rows, and what went wrong."""


@dataclass(slots=True)
class Book:
    """What was measured so far, kept in a file after each figure. ``failed``: a process ended badly."""

    settings: dict[str, Any]
    rehearsal: bool
    results: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: bool = False

    def result(self) -> Result:
        """All of it so far, as a result."""
        chip = next((row["chip"] for row in self.rows if row["row"] == "roof"), "unknown chip")
        rehearsed = "A rehearsal on the processor with tiny models: its figures mean nothing. "
        skipped = "; ".join(self.skipped) or "nothing"
        return Result(
            benchmark="gpu-rehearsal" if self.rehearsal else "gpu",
            checks=checks(self.rows),
            settings=self.settings,
            rows=[_line(row) for row in self.rows],
            note=f"{rehearsed * self.rehearsal}Random weights; medians of calls. Skipped: {skipped}.",
            chip=chip,
            rehearsal=self.rehearsal,
            details={"figures": self.rows, "skipped": self.skipped},
        )

    def save(self) -> None:
        """Write the JSON."""
        self.result().save(self.results)


_REHEARSED: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "rehearsal": True,
    "steps": 2,
    "batch": 2,
    "seconds": 0.0,
    "pictures": 4,
}


def figures(models: Sequence[str], folder: Path, *, rehearsal: bool) -> list[Figure]:
    """Everything that is measured, in the order of its weight."""
    how = _REHEARSED if rehearsal else {}
    tasks = [Task(model=model, folder=str(folder / model), **how) for model in models]
    return [
        *(Figure("roof", task) for task in tasks[:1]),
        *(figure for task in tasks for figure in _needed(task)),
        *(figure for task in tasks for figure in _optional(task)),
    ]


def _needed(task: Task) -> list[Figure]:
    """Plain diffusers, the engine, compiled with a cold cache, and the whole job with a warm one."""
    pictures = task.pictures if task.model == "sd15" else min(task.pictures, 80)
    return [
        Figure("build", task),
        Figure("eager", replace(task, engine={"compile": "never"})),
        Figure("compiled", _compiling(task), ("compile",)),
        Figure("job", replace(_compiling(task), pictures=pictures)),
    ]


def _optional(task: Task) -> list[Figure]:
    """Each approximation by itself, compiled where that can be."""
    cached, small = {"feature_cache": 3}, {"autoencoder": f"{task.folder}-autoencoder"}
    few = replace(_compiling(task), steps=4, guidance=1.0)
    options = [
        Figure("option", replace(_compiling(task), engine={**_compiling(task).engine, **each}), tuple(each))
        for each in (cached, small)
    ]
    return [*options, Figure("option", few)]


def _compiling(task: Task) -> Task:
    if task.rehearsal:
        return replace(task, engine={"compile": "never"})  # minutes of a C++ compiler would rehearse nothing
    return replace(task, engine={"compile": "always", "compile_cache": f"{task.folder}-compiled"})


def process(figure: Figure, seconds: float) -> tuple[list[dict[str, Any]], str | None]:
    """Return the rows that a measuring process of its own printed, and what went wrong with it."""
    program = [sys.executable, "-m", "benchmarks.gpu.measures"]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        trouble = None
        try:
            done = subprocess.run(
                [*program, figure.measure, json.dumps(asdict(figure.task))],
                cwd=_ROOT,
                env=_environment(figure),
                stdout=out,
                stderr=log,
                timeout=seconds,
                check=False,
            )
            if done.returncode:
                log.seek(0)
                trouble = (log.read().strip().splitlines() or [f"status {done.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            trouble = "out of time"
        out.seek(0)
        return [json.loads(line) for line in out if line.startswith("{")], trouble


def measure(
    book: Book,
    planned: Sequence[Figure],
    until: float,
    *,
    run: Run = process,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Measure in order until ``until`` by the clock; what fails or is late is noted as skipped."""
    for figure in planned:
        name = f"{figure.task.model} {figure.measure} {' '.join(figure.needs)}".strip()
        lacking = missing(dict.fromkeys(figure.needs))
        left = until - clock()
        if lacking:
            book.skipped.append(f"{name} (this version has no {', '.join(lacking)})")
        elif left < _LEAST:
            book.skipped.append(f"{name} (no time left)")
        else:
            rows, trouble = run(figure, left)
            book.rows += [{"model": figure.task.model, **row} for row in rows]
            if trouble:
                book.failed = True
                book.skipped.append(f"{name} ({trouble})")
            print(f"{name}: {trouble or 'measured'}, {until - clock():.0f} s left", file=sys.stderr)
        book.save()


def _environment(figure: Figure) -> dict[str, str]:
    """One thread on the processor, where two on busy cores stall; no hub anywhere."""
    threads = {"OMP_NUM_THREADS": "1"} if figure.task.rehearsal else {}
    return {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _line(row: dict[str, Any]) -> dict[str, Any]:
    """A figure as the table shows it."""
    return {
        "model": row["model"],
        "what": row["row"],
        "images/s": row.get("images_per_second", "–"),
        "TFLOP/s": "–" if row.get("approximate") else row.get("tflops", "–"),
        "compile s": row.get("compile_seconds", "–"),
        "device busy": row.get("device_busy", "–"),
    }


def main(argv: Sequence[str] | None = None, run: Run = process) -> int:
    """Measure, print, keep; the exit status: 2 where there is no GPU. ``run`` measures one figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the processor")
    parser.add_argument("--models", nargs="+", choices=("sd15", "sdxl"), default=("sd15", "sdxl"))
    parser.add_argument("--seconds", type=float, default=570.0, help="that all of it may take")
    parser.add_argument("--folder", type=Path, help="keeps the models and what was compiled")
    parser.add_argument("--results", type=Path, help="where the JSON goes; a rehearsal's is not kept")
    asked = parser.parse_args(argv)
    until = time.monotonic() + asked.seconds
    try:
        check_device("cpu" if asked.rehearse else "cuda")
    except DeviceFailed:
        print("benchmarks.gpu needs an NVIDIA or AMD GPU, and there is none; --rehearse tries it without")
        return 2
    with tempfile.TemporaryDirectory(prefix="text2img-gpu-") as thrown_away:
        folder = asked.folder or Path(thrown_away)
        results = asked.results or (Path(thrown_away) if asked.rehearse else RESULTS)
        book = Book({"models": list(asked.models), "seconds": asked.seconds}, asked.rehearse, results)
        planned = figures(asked.models, folder, rehearsal=asked.rehearse)
        measure(book, planned, until, run=run)
        result = book.result()
        print(report(result))
    return 1 if book.failed else result.status


if __name__ == "__main__":
    sys.exit(main())
