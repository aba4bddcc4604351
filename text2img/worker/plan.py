"""What one run shall do, and what it works with. Knows no step of the work itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from text2img.engine.loras import Library
from text2img.images import Encoder
from text2img.prompts.object_names import ObjectName, TryName
from text2img.prompts.webhook_urls import WebhookHosts
from text2img.telemetry.tracing import Untraced

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from text2img.concurrency.stages import Stopwatch
    from text2img.databases import Database, Selection
    from text2img.engine import Engine, ModelCard
    from text2img.evaluation import Evaluator
    from text2img.prompts import Outcome, Wishes
    from text2img.prompts.refinement import Loop
    from text2img.reports.sidecars import Sidecars
    from text2img.storage import ImageStorage
    from text2img.telemetry.progress import Progress
    from text2img.telemetry.tracing import Traces
    from text2img.worker.leases import Leases
    from text2img.worker.polling import Rounds
    from text2img.worker.watchdog import Guard


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one run shall do. ``wishes`` are the run's own, the most specific first.

    ``multiple`` is what a size must be a multiple of, as the model wants it.
    ``batch_size`` is the largest; with ``fastest_size`` the run finds out which size up to it is fastest.
    With a ``loop`` prompts are drawn until an evaluator is content.
    ``waiting`` is how many prompts could be claimed when the run began, ``limit`` how many it takes at most.
    """

    run_id: str
    worker: str
    selection: Selection
    wishes: Sequence[Wishes]
    batch_size: int = 10
    fastest_size: bool = False
    waiting: int = 0
    limit: int | None = None
    max_attempts: int = 3
    upload_workers: int = 16
    tell: bool = False
    multiple: int = 8
    object_name: ObjectName | TryName = field(default_factory=ObjectName)
    loop: Loop | None = None

    @property
    def to_make(self) -> int:
        """How many prompts the run will make, as far as could be known at its start."""
        return self.waiting if self.limit is None else min(self.waiting, self.limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a worker works with. The engine is inspected and not yet loaded; all else is ready to use.

    ``seconds`` adds up the stages' time; ``recorded`` is called with the outcomes that were; prompts may
    have webhooks on ``webhook_hosts`` alone. ``serving`` waits for more where nothing is left; without it the
    run ends then. ``more(wanted)`` is asked for a share of the run's limit, where others work at it as well.
    """

    database: Database
    storage: ImageStorage
    engine: Engine
    card: ModelCard
    leases: Leases
    guard: Guard
    progress: Progress
    seconds: Stopwatch
    recorded: Callable[[Sequence[Outcome]], None]
    traces: Traces = field(default_factory=Untraced)
    encoder: Encoder = field(default_factory=Encoder)
    evaluator: Evaluator | None = None
    sidecars: Sidecars | None = None
    loras: Library = field(default_factory=Library)
    webhook_hosts: WebhookHosts = field(default_factory=WebhookHosts)
    serving: Rounds | None = None
    more: Callable[[int], int] | None = None
