"""What one worker does in a run: its parts are built from the settings, and it works until nothing is left.

Knows neither the run's document nor its end nor who is told of it; ``job`` does.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from text2img.concurrency.stages import StageTimer
from text2img.databases.retrying import with_retries
from text2img.telemetry.tracing import NoopTraces
from text2img.worker import build
from text2img.worker.flow import Plan, Worker, WorkerDeps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from text2img.concurrency.signals import Stop
    from text2img.databases import Database
    from text2img.engine import Engine, ModelInfo
    from text2img.prompts import Outcome, RequestedParameters
    from text2img.settings import Settings
    from text2img.storage import ImageStorage
    from text2img.telemetry.progress import Progress
    from text2img.telemetry.stats import RunStats
    from text2img.telemetry.tracing import Traces
    from text2img.worker.leases import Leases
    from text2img.worker.polling import WorkSource
    from text2img.worker.watchdog import Watchdog


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What a run gives whoever works in it. ``name`` is who claims, ``waiting`` how many prompts could be
    claimed when the run began; ``recorded`` is called with outcomes once they are written down; ``serving``
    and ``more`` as in Parts. Who works in this process is seen by ``traces``.
    """

    run_id: str
    name: str
    waiting: int
    leases: Leases
    watchdog: Watchdog
    progress: Progress
    stats: RunStats
    recorded: Callable[[Sequence[Outcome]], None]
    serving: WorkSource | None = None
    more: Callable[[int], int] | None = None
    traces: Traces = field(default_factory=NoopTraces)


class Executor(Protocol):
    """Whoever does a run's work; what it came to may be asked at any time, from any thread."""

    @property
    def model(self) -> str | None:
        """The model that draws, once it is known."""
        ...

    def work(self, place: RunContext) -> None:
        """Work until nothing is left to claim.

        Raises RunFailed when a part has failed, Stopped when the run was asked to end, and
        ConfigurationError for what was found to be wrong before the first claim.
        """
        ...

    def spent(self) -> dict[str, float]:
        """Seconds so far, by stage."""
        ...

    def peak_memory(self) -> int:
        """The most memory of the device in bytes that was in use at once; see Engine."""
        ...


class LocalExecutor:
    """One worker, in this process. See Executor."""

    def __init__(self, settings: Settings, database: Database, storage: ImageStorage, stop: Stop) -> None:
        self._settings, self._database, self._storage, self._stop = settings, database, storage, stop
        self._seconds = StageTimer()
        self._engine: Engine | None = None
        self.model: str | None = None

    def work(self, place: RunContext) -> None:
        """Build the parts, check what can be checked without weights, and work; see Executor."""
        encoder, evaluator = build.encoder(self._settings), build.evaluator(self._settings)
        self._storage.check()
        if evaluator is not None:
            evaluator.check()
        configuration = self._database.model_configuration(self._settings.model_config_id)
        self._seconds = StageTimer(place.traces.stage)
        engine = self._engine = build.engine(self._settings, configuration, self._stop.wait)
        model_info = engine.inspect()
        self.model = model_info.name
        wished = build.run_defaults(self._settings, model_info, configuration)
        build.validate_defaults(self._settings, model_info, wished)
        database = with_retries(self._database, self._settings.database_patience, self._stop.wait)
        worker_parts = WorkerDeps(
            database=database,
            storage=self._storage,
            engine=engine,
            model_info=model_info,
            leases=place.leases,
            watchdog=place.watchdog,
            progress=place.progress,
            seconds=self._seconds,
            recorded=place.recorded,
            traces=place.traces,
            encoder=encoder,
            evaluator=evaluator,
            sidecars=build.sidecars(self._settings, self._storage, database.holds),
            loras=build.loras(self._settings, self._stop.wait),
            webhook_hosts=build.webhook_hosts(self._settings),
            serving=place.serving,
            more=place.more,
        )
        with place.serving or nullcontext():
            Worker(worker_parts, self._plan(place, wished, model_info), self._stop, place.stats).run()
        engine.close()  # telling may take a while, which needs no weights

    def spent(self) -> dict[str, float]:
        """See Executor."""
        return {**self._seconds.seconds(), **(self._engine.seconds if self._engine else {})}

    def peak_memory(self) -> int:
        """See Executor."""
        return self._engine.peak_memory() if self._engine else 0

    def _plan(self, place: RunContext, wished: Sequence[RequestedParameters], model_info: ModelInfo) -> Plan:
        settings = self._settings
        return Plan(
            run_id=place.run_id,
            worker=place.name,
            selection=build.selection(settings),
            requested=wished,
            batch_size=settings.batches.most,
            fastest_size=settings.batches.auto,
            waiting=place.waiting,
            limit=settings.limit,
            max_attempts=settings.max_attempts,
            upload_workers=settings.upload_workers,
            tell=settings.callback_url is not None,
            multiple=model_info.multiple,
            object_name=settings.object_names,
            loop=settings.loop,
        )
