"""Executors do the work of a run; the local one runs a single worker in this process."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Protocol

from text2img.worker import build
from text2img.worker.flow import Worker

if TYPE_CHECKING:
    from text2img.engine import Engine
    from text2img.settings import Settings
    from text2img.worker.build import Dependencies, RunContext


class Executor(Protocol):
    """Does a run's work. The properties may be read at any time, from any thread."""

    @property
    def model(self) -> str | None:
        """The name of the model, once it is known."""
        ...

    def work(self, run: RunContext) -> None:
        """Work until nothing is left to claim.

        Raises RunFailed when a part has failed, Stopped when the run was asked to end, and
        ConfigurationError for what is found to be wrong before the first claim.
        """
        ...

    def spent(self) -> dict[str, float]:
        """Return the seconds spent so far, by stage."""
        ...

    def peak_memory(self) -> int:
        """Return the most bytes of the device's memory that were in use at once; see Engine."""
        ...


class LocalExecutor:
    """One worker in this process. See Executor."""

    def __init__(self, settings: Settings, deps: Dependencies) -> None:
        self._settings, self._deps = settings, deps
        self._run: RunContext | None = None
        self._engine: Engine | None = None
        self.model: str | None = None

    def work(self, run: RunContext) -> None:
        """Check storage, evaluator and model, as far as that needs no weights, and work; see Executor."""
        self._run = run
        self._deps.storage.check()
        if self._deps.evaluator is not None:
            self._deps.evaluator.check()
        configuration = run.database.runs.model_configuration(self._settings.model_config_id)
        engine = self._engine = build.engine(self._settings, configuration, run.stop.wait)
        model_info = engine.inspect()
        self.model = model_info.name
        requested = build.run_defaults(self._settings, model_info, configuration)
        build.validate_defaults(self._deps, model_info, requested)
        with run.serving or nullcontext():
            Worker(self._deps, run, engine, model_info, requested).run()
        engine.close()  # the last notifications may take a while, and need no weights

    def spent(self) -> dict[str, float]:
        """See Executor."""
        stages = self._run.seconds.seconds() if self._run else {}
        return {**stages, **(self._engine.seconds if self._engine else {})}

    def peak_memory(self) -> int:
        """See Executor."""
        return self._engine.peak_memory() if self._engine else 0
