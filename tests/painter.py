"""An engine that paints its seed, and a bench to try the worker on with it: no model, no GPU, no wait."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tests.clock import Clock, elapse
from text2img.concurrency.signals import Stop
from text2img.concurrency.stages import StageTimer
from text2img.databases import Collections, NewPrompt, Selection, open_database
from text2img.engine import GeneratedImage, ModelInfo
from text2img.engine.loras import LoraCache
from text2img.prompts import PromptId, RequestedParameters
from text2img.storage import open_storage
from text2img.telemetry.progress import NullProgress, RunStats
from text2img.telemetry.tracing import NoopTraces
from text2img.worker.build import Dependencies, RunContext
from text2img.worker.flow import Worker
from text2img.worker.leases import Leases
from text2img.worker.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

CARD = ModelInfo(
    name="painter", revision=None, family="test", width=64, height=64, multiple=8,
    scheduler="none", schedulers=(),
)  # fmt: skip
WISHES = (RequestedParameters(num_inference_steps=3, guidance_scale=1, width=64, height=64),)


@dataclass
class Painter:
    """An engine whose pictures show their seed; ``fault`` may raise, or return what a prompt becomes."""

    fault: Callable = lambda request: None
    batches: list = field(default_factory=list)
    seconds: dict = field(default_factory=dict)

    def load(self):
        pass

    def prepare(self, request):
        return request

    def warm_up(self, batch, remaining):
        pass

    def generate(self, batch, on_step):
        self.batches.append([str(request.prompt.id) for request in batch])
        for step in range(3):
            on_step(step + 1, 3)
        return [self.fault(request) or self._paint(request) for request in batch]

    def close(self):
        pass

    def _paint(self, request):
        shade = request.parameters.seed % 251
        return GeneratedImage(pixels=np.full((64, 64, 3), shade, np.uint8), scheduler="none")


class Hurried(Stop):
    """A run that may be stopped, and whose waits advance the clock instead."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, seconds: float) -> None:
        self._clock.advance(seconds)
        self.check()


class Bench:
    """A database (a SQLite file, unless ``url`` names another) with prompts 0 … n−1 (seed = id), a folder,
    and workers for them.
    """

    def __init__(self, folder: Path, prompts: int, url: str | None = None) -> None:
        self.database = open_database(url or f"sqlite:///{folder}/prompts.db", Collections())
        self.database.runs.enqueue(
            NewPrompt(id=PromptId("int", str(n)), text="a cat", requested=RequestedParameters(seed=n))
            for n in range(prompts)
        )
        self.storage = open_storage(str(folder / "pictures"))
        self.folder, self.file = folder / "pictures", folder / "prompts.db"
        self.stop, self.stats, self.clock = Stop(), RunStats(), time.monotonic
        self.loras = LoraCache()
        self.serving = self.evaluator = None
        self.seconds, self.progress, self.traces = StageTimer(), NullProgress(), NoopTraces()
        self.leases = lambda: Leases(self.database.queue, 60, lambda: None)
        self.waiting, self.requested, self.batch_size = prompts, WISHES, 4

    def hurry(self) -> Clock:
        """Have the run's retries wait by a clock alone, which passes for the database as well; return it."""
        self.clock = Clock(partial(elapse, self.file))
        self.stop = Hurried(self.clock)
        return self.clock

    def work(
        self, engine: Painter, requested: Sequence[RequestedParameters] | None = None, **changes: object
    ) -> None:
        """Run a worker with this engine; ``changes`` are fields of its Dependencies or its RunContext."""
        built = {each.name for each in fields(Dependencies)}
        deps = Dependencies(
            **{
                "storage": self.storage,
                "evaluator": self.evaluator,
                "loras": self.loras,
                "batch_size": self.batch_size,
                "max_attempts": 2,
                **{name: value for name, value in changes.items() if name in built},
            }
        )
        run = RunContext(
            **{
                "run_id": "night",
                "worker": "w1",
                "database": self.database,
                "leases": self.leases(),
                "watchdog": Watchdog(self.stop, 300, lambda status: None),
                "progress": self.progress,
                "stop": self.stop,
                "recorded": lambda outcomes: None,
                "stats": self.stats,
                "seconds": self.seconds,
                "traces": self.traces,
                "waiting": self.waiting,
                "serving": self.serving,
                **{name: value for name, value in changes.items() if name not in built},
            }
        )
        Worker(deps, run, engine, CARD, requested or self.requested, clock=self.clock).run()

    def shade(self, name: str) -> int:
        with Image.open(self.folder / f"{name}.png") as image:
            return image.getpixel((0, 0))[0]

    @property
    def counts(self) -> tuple[int, int, int, int]:
        counts = self.database.runs.counts(Selection())
        return counts.pending, counts.processing, counts.completed, counts.error
