"""What the job itself costs: prompts a second with an engine that costs nothing, by database and storage.

Each prompt is claimed, its 512² picture encoded, stored and recorded; what is counted begins with the first
batch, so that imports are not in it. The servers share the machine with the job, so that prompts/s say as
much of them; ``cpu ms`` is what a prompt costs the job's own process, and ``encode ms`` what encoding its
picture takes, measured alone in the same process. ``--profile`` says where the rest goes.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from PIL import Image

from benchmarks.job import apart, run_job
from benchmarks.places import DATABASES, STORAGES, places
from benchmarks.results import RESULTS, Check, Result, report, table
from benchmarks.sampler import Sampler, Share
from benchmarks.stub import StubEngine, pictures
from text2img.images import FORMATS, encode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.places import Place

Kind = tuple[str, str]
"""A database and a storage."""
_BATCH = 10
_TARGET = 1.5  # the job's processor time, in encodings of its pictures; ours, to notice what is silly


@dataclass(frozen=True, slots=True)
class Cost:
    """One job's cost a prompt. ``encode`` is the same process's for the same pictures, one thread."""

    seconds: float
    cpu: float
    encode: float
    shares: Sequence[Share]


def cost(place: Place, prompts: int, side: int, *, profile: bool) -> Cost:
    """Let the job make ``prompts`` pictures of ``side``² pixels there; what it cost a prompt."""
    place.add(prompts)
    encode = _encode_seconds(side)
    engine, sampler = StubEngine(side), Sampler()
    arguments = [*place.arguments, "--batch-size", str(_BATCH), "--log-format", "json"]
    if profile:
        with sampler:
            span = run_job(engine, arguments, place.variables, place.folder)
    else:
        span = run_job(engine, arguments, place.variables, place.folder)
    seconds, cpu = span.ended - engine.batches[0][0], span.cpu - engine.cpu
    return Cost(seconds / prompts, cpu / prompts, encode, sampler.shares() if profile else [])


def _encode_seconds(side: int) -> float:
    """Processor seconds to encode one picture, the median of all."""
    took = []
    for pixels in pictures(side):
        begun = time.process_time()
        encode(Image.fromarray(pixels), {}, FORMATS["png"], None)
        took.append(time.process_time() - begun)
    return median(took)


def measure(prompts: int, side: int, rounds: int, kinds: Sequence[Kind]) -> dict[Kind, list[Cost]]:
    """Each round's cost by database and storage, all kinds once a round."""
    costs: dict[Kind, list[Cost]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for database, storage in kinds:
            with places(database, storage) as place:
                costs[database, storage].append(apart(cost, place(), prompts, side, profile=False))
    return costs


def result(prompts: int, side: int, rounds: int, costs: Mapping[Kind, Sequence[Cost]]) -> Result:
    """The medians of the rounds, by database and storage, against the target."""
    rows = [_row(kind, each) for kind, each in costs.items()]
    return Result(
        benchmark="overhead",
        checks=[
            Check(
                figure=f"processor time a prompt ÷ encoding alone, {row['database']} and {row['storage']}",
                measured=row["cpu ÷ encode"],
                target=_TARGET,
                at_least=False,
            )
            for row in rows
        ],
        settings={"prompts": prompts, "side": side, "batch": _BATCH, "rounds": rounds},
        rows=rows,
        note="The cores are shared with the servers and with other work: prompts/s are a lower bound.",
    )


def _row(kind: Kind, costs: Sequence[Cost]) -> dict[str, Any]:
    return {
        "database": kind[0],
        "storage": kind[1],
        "prompts/s": 1 / median(each.seconds for each in costs),
        "cpu ms": 1000 * median(each.cpu for each in costs),
        "encode ms": 1000 * median(each.encode for each in costs),
        "cpu ÷ encode": median(each.cpu / each.encode for each in costs),
    }


def profile(prompts: int, side: int, kinds: Sequence[Kind], top: int) -> str:
    """The functions that took most processor time, by themselves and with what they called, as tables."""
    pages = []
    for kind in kinds:
        with places(*kind) as place:
            found = apart(cost, place(), prompts, side, profile=True)
        pages.append(page(kind, found.shares, prompts, top))
    return "\n".join(pages)


def page(kind: Kind, shares: Sequence[Share], prompts: int, top: int) -> str:
    """Two tables of the profile of one kind: of all functions, and of our own with what they call."""
    ours = sorted((share for share in shares if "text2img" in share.function), key=_whole, reverse=True)
    tables = {"by itself": shares, "our functions, with what they call": ours}
    return "\n".join(
        f"\n{' and '.join(kind)}, {title}:\n{table(_lines(each[:top], prompts))}"
        for title, each in tables.items()
    )


def _whole(share: Share) -> float:
    return share.whole


def _lines(shares: Sequence[Share], prompts: int) -> list[dict[str, object]]:
    return [
        {
            "own ms a prompt": 1000 * share.own / prompts,
            "whole": 1000 * share.whole / prompts,
            "function": share.function,
        }
        for share in shares
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, keep; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--database", choices=DATABASES, action="append")
    parser.add_argument("--storage", choices=STORAGES, action="append")
    parser.add_argument("--profile", action="store_true", help="print the top functions; keeps no result")
    parser.add_argument("--top", type=int, default=25, help="functions a table")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(argv)
    kinds = [(one, other) for one in asked.database or DATABASES for other in asked.storage or STORAGES]
    if asked.profile:
        print(profile(asked.prompts, asked.side, kinds, asked.top))
        return 0
    costs = measure(asked.prompts, asked.side, asked.rounds, kinds)
    outcome = result(asked.prompts, asked.side, asked.rounds, costs)
    print(report(outcome))
    outcome.save(asked.results)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
