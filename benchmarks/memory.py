"""Does memory grow with the number of prompts? 10,000 of them through the whole job, in a fresh process.

The engine costs nothing and its pictures are of 512²; SQLite and a folder hold what is made, which takes
some minutes. After each batch the process's resident set is read. Nothing is collected or trimmed for the
occasion: the figure is the median over the last tenth of the batches ÷ the median around a tenth of the
prompts, and the series stands in the JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import psutil

from benchmarks.job import apart, run_job
from benchmarks.places import places
from benchmarks.results import RESULTS, Check, Result, report
from benchmarks.stub import StubEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.places import Place
    from text2img.engine import GeneratedImage
    from text2img.errors import PromptFailed
    from text2img.prompts import Request

_BATCH = 10
_LEASE = 3  # seconds: what a lease's first extension takes for good, it takes before the growth is looked at
_MEBIBYTE = 2**20


class Watched(StubEngine):
    """Reads the resident set after each batch: ``series`` holds (pictures so far, bytes)."""

    def __init__(self, side: int) -> None:
        super().__init__(side)
        self.series: list[tuple[int, int]] = []
        self._process = psutil.Process()

    def generate(
        self, batch: Sequence[Request], on_step: Callable[[int, int], None]
    ) -> list[GeneratedImage | PromptFailed]:
        """The stub's pictures; see Engine."""
        made = super().generate(batch, on_step)
        so_far = self.series[-1][0] if self.series else 0
        self.series.append((so_far + len(batch), self._process.memory_info().rss))
        return made


def series(place: Place, side: int) -> list[tuple[int, int]]:
    """(pictures so far, resident bytes) after each batch of a job that works there until nothing is left."""
    engine = Watched(side)
    arguments = [*place.arguments, "--batch-size", str(_BATCH), "--lease-seconds", str(_LEASE)]
    run_job(engine, arguments, place.variables, place.folder)
    return engine.series


def growth(seen: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Resident bytes around a tenth of the pictures and over the last tenth, each the median of a tenth."""
    total = seen[-1][0]
    early = [held for made, held in seen if 0.05 * total < made <= 0.15 * total]
    late = [held for made, held in seen if made > 0.9 * total]
    return median(early), median(late)


def result(seen: Sequence[tuple[int, int]], side: int) -> Result:
    """The growth against its target, the series in twenty lines."""
    total, (early, late) = seen[-1][0], growth(seen)
    step = max(1, len(seen) // 20)
    return Result(
        benchmark="memory",
        checks=[
            Check(
                figure=f"growth of resident memory from {total // 10:,} to {total:,} prompts",
                measured=100 * (late / early - 1),
                target=5.0,
                at_least=False,
                unit="%",
            )
        ],
        settings={
            "prompts": total,
            "side": side,
            "batch": _BATCH,
            "lease seconds": _LEASE,
            "database": "sqlite",
            "storage": "folder",
        },
        rows=[{"prompts": made, "resident MiB": held / _MEBIBYTE} for made, held in seen[step - 1 :: step]],
        note=f"Pictures of {side}²; without torch, whose size would hide a small growth.",
        details={"series": [[made, held] for made, held in seen]},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, keep; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(argv)
    with places("sqlite", "folder") as place:
        here = place()
        here.add(asked.prompts)
        seen = apart(series, here, asked.side)
    outcome = result(seen, asked.side)
    print(report(outcome))
    outcome.save(asked.results)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
