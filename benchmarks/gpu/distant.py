"""The whole job with the real engine, and a distance before its database and its storage.

Both are files here, and the distance is a wait before each call of theirs: servers of the wire protocols may
be missing where the GPU is, and would take the processor from what is measured.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.job import run_job
from benchmarks.places import places
from text2img.databases import Collections, open_database
from text2img.worker import build

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.gpu.task import Task
    from text2img.engine import Engine, GeneratedImage
    from text2img.errors import PromptFailed
    from text2img.prompts import Request

DATABASE_SECONDS, STORAGE_SECONDS = 0.020, 0.150


class Far:
    """What stands ``near``, with every call of a method ``seconds`` later."""

    def __init__(self, near: object, seconds: float) -> None:
        self._near, self._seconds = near, seconds

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._near, name)
        if not callable(found):
            return found

        def call(*args: object, **kwargs: object) -> object:
            time.sleep(self._seconds)
            return found(*args, **kwargs)

        return call


class Timed:
    """An engine, with ``batches``: when each call of ``generate`` began and ended (``time.monotonic``)."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.batches: list[tuple[float, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(
        self, batch: Sequence[Request], on_step: Callable[[int, int], None]
    ) -> list[GeneratedImage | PromptFailed]:
        """The engine's pictures; see Engine."""
        begun = time.monotonic()
        made = self._engine.generate(batch, on_step)
        self.batches.append((begun, time.monotonic()))
        return made


def distant_job(task: Task) -> dict[str, Any]:
    """Let the job make the task's pictures; its pace, how busy the device was, and the run's document.

    The engine loads its weights within the job, as it would for a user, and finds what an earlier process
    compiled: ``compile_seconds`` are those of a warm cache.
    """
    engine = Timed(task.unopened())
    with places("sqlite", "folder") as place:
        here = place()
        here.add(task.pictures)
        with (
            patch.object(build, "database", _far(build.database, DATABASE_SECONDS)),
            patch.object(build, "storage", _far(build.storage, STORAGE_SECONDS)),
        ):
            span = run_job(engine, [*here.arguments, *task.arguments()], here.variables, here.folder)
        near = open_database(here.near, Collections(), create=False)
        (document,) = near.runs.last_runs(1)
        near.close()
    first, last = engine.batches[0][0], engine.batches[-1][1]
    busy = sum(ended - begun for begun, ended in engine.batches)
    pace = document.completed / (last - first)
    return {
        "images_per_second": pace,
        "tflops": pace * task.teraflop(),
        "images_per_second_to_the_end": document.completed / (span.ended - first),
        "completed": document.completed,
        "compile_seconds": engine.seconds.get("compile", 0.0),
        "device_busy": busy / (last - first),
        "device_busy_of_all": busy / (span.ended - span.begun),
        "start_seconds": first - span.begun,
        "run": {
            name: str(value) if name.endswith("_at") else value for name, value in asdict(document).items()
        },
    }


def _far(opens: Callable[..., object], seconds: float) -> Callable[..., Far]:
    return lambda *args, **kwargs: Far(opens(*args, **kwargs), seconds)
