"""The whole job, ``text2img run``, in one plain process and in several at once: what do more of them bring?

Each has a device that sleeps; they know nothing of one another but by the database.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.job import at_once, run_job
from benchmarks.places import places
from benchmarks.stub import StubEngine

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.places import Place

_SIDE = 64  # pixels
_BATCH = 4


def pace(processes: int, prompts: int, seconds: float) -> float:
    """Pictures a second of so many processes on one SQLite file, from the first batch's start to the end."""
    with places("sqlite", "folder") as fresh:
        place = fresh()
        place.add(prompts)
        spans = at_once(_job, [(place, number, seconds) for number in range(processes)])
    made = sum(pictures for _, _, pictures in spans)
    if made != prompts:
        raise RuntimeError(f"{made} pictures of {prompts} prompts")
    return made / (max(ended for _, ended, _ in spans) - min(begun for begun, _, _ in spans))


def _job(place: Place, number: int, seconds: float, ready: Callable[[], object]) -> tuple[float, float, int]:
    """When its first batch began and its last one was recorded, and how many pictures it made."""
    engine = StubEngine(_SIDE, seconds)
    folder = place.folder / f"job-{number}"
    folder.mkdir()
    arguments = [*place.arguments, "--batch-size", str(_BATCH), "--log-format", "json"]
    ready()
    span = run_job(engine, arguments, place.variables, folder)
    return engine.batches[0][0] if engine.batches else span.begun, span.ended, engine.made
