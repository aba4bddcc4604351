"""``run``: the one-shot job, from the settings to the one line at its end."""

from __future__ import annotations

import logging
import os
import platform
import socket
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from text2img import __version__
from text2img.cli import parts
from text2img.databases import Run
from text2img.databases.patient import patient
from text2img.deadline import within
from text2img.engine.devices import check_device
from text2img.errors import ConfigurationError, DatabaseFailed, PromptFailed, Stopped
from text2img.guard import Guard, stopping
from text2img.leases import Leases
from text2img.prompts import Claim, Prompt, PromptId, Wishes, request
from text2img.settings import DEFAULTS
from text2img.stages import Stopwatch
from text2img.storage import open_storage
from text2img.tally import Tally
from text2img.worker import Parts, Plan, Worker

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from text2img.databases import Database
    from text2img.engine import Engine, ModelCard
    from text2img.progress import Progress
    from text2img.settings import Settings
    from text2img.stages import Stop
    from text2img.storage import ImageStorage

log = logging.getLogger("text2img.run")


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Do the job; the exit status."""
    _ = settings.database_url
    storage = open_storage(settings.output_url)
    parts.receiver(settings)
    if arguments.dry_run:
        from text2img.cli.dry_run import show

        return show(settings)
    check_device(settings.device)
    return work(settings, storage, progress)


def work(settings: Settings, storage: ImageStorage, progress: Progress) -> int:
    """Run the job on these parts and print its one line; the exit status."""
    with closing(parts.database(settings)) as database, stopping() as stop:
        job = Job(settings, database, storage, stop)
        with Guard(stop, settings.stall_timeout, job.give_up) as guard:
            job.run(progress, guard)
        print(job.summary())
    return 3 if job.tally.failed else 0


class Job:
    """One run: what is checked before the first claim, the worker, what is kept and told afterwards."""

    def __init__(self, settings: Settings, database: Database, storage: ImageStorage, stop: Stop) -> None:
        self._settings, self._database, self._storage, self._stop = settings, database, storage, stop
        self._selection = parts.selection(settings)
        self._name = parts.worker_name()
        self._run = Run(
            id=settings.run_id or parts.run_id(), started_at=datetime.now(UTC), host=socket.gethostname()
        )
        self._teller = parts.teller(settings, database, self._run.id, self._name)
        self._leases = Leases(database, settings.lease_seconds, lambda: self._save("running"))
        self._seconds = Stopwatch()
        self._engine: Engine | None = None
        self.tally = Tally()

    def run(self, progress: Progress, guard: Guard) -> None:
        """Work through what is pending. A run that finds nothing touches neither storage nor model."""
        waiting = self._database.pending(self._selection)
        log.info("prompts waiting: %d", waiting, extra={"event": "start", "run_id": self._run.id})
        status = "failed"
        self._teller.start()
        try:
            if waiting:
                self._work(waiting, progress, guard)
            status = "completed"
        except Stopped:
            status = "stopped"
            raise
        finally:
            progress.end()
            self._close(status, worked=waiting > 0)

    def summary(self) -> str:
        """The one line that a run ends with."""
        tally, left = self.tally, self._database.counts(self._selection)
        later = self._database.postponed(self._selection)
        waits = f" ({later} to be tried again later)" if later else ""
        others = f", {left.processing} with other workers" if left.processing else ""
        done = f"completed {tally.completed}, failed {tally.failed}, remaining {left.pending}{waits}{others}"
        return f"{done}; {tally.images_per_second:.2f} images/s; {self._settings.output_url}"

    def give_up(self, status: int) -> None:
        """The last resort: give back what is claimed, if that takes no time, and leave at once."""
        with suppress(Exception):
            within(1, self._leases.release)
            within(0.5, lambda: self._save("failed" if status == 1 else "stopped"))
        logging.shutdown()
        os._exit(status)

    def _work(self, waiting: int, progress: Progress, guard: Guard) -> None:
        self._save("running")
        progress.begin(min(waiting, self._settings.limit or waiting))
        self._storage.check()
        configuration = self._database.model_configuration(self._settings.model_config_id)
        engine = self._engine = parts.engine(self._settings, configuration)
        card = engine.inspect()
        engine.load()
        log.info("loaded %s", card.name, extra={"event": "loaded", "model": card.name})
        self._run = replace(self._run, model=card.name)
        wishes = self._wishes(card, configuration.wishes if configuration else Wishes())
        _check_wishes(engine, wishes)
        worker_parts = Parts(
            database=patient(self._database, self._settings.database_patience, self._stop.wait),
            storage=self._storage,
            engine=engine,
            card=card,
            leases=self._leases,
            guard=guard,
            progress=progress,
            seconds=self._seconds,
            recorded=self._teller.recorded,
        )
        Worker(worker_parts, self._plan(wishes), self._stop, self.tally).run()

    def _wishes(self, card: ModelCard, configured: Wishes) -> tuple[Wishes, ...]:
        """What the run wishes for every picture, the most specific first."""
        return (self._settings.wishes, configured, DEFAULTS, Wishes(width=card.width, height=card.height))

    def _plan(self, wishes: Sequence[Wishes]) -> Plan:
        settings = self._settings
        return Plan(
            run_id=self._run.id,
            worker=self._name,
            selection=self._selection,
            wishes=wishes,
            batch_size=settings.batch_size,
            limit=settings.limit,
            max_attempts=settings.max_attempts,
            upload_workers=settings.upload_workers,
            tell=settings.callback_url is not None,
        )

    def _save(self, status: str) -> None:
        """Write down how the run stands; while it runs this also says that it is alive."""
        tally, engine = self.tally, self._engine
        run = replace(
            self._run,
            status=status,
            finished_at=None if status == "running" else datetime.now(UTC),
            completed=tally.completed,
            failed=tally.failed,
            postponed=tally.postponed,
            images_per_second=round(tally.images_per_second, 4),
            device_busy=round(tally.device_busy, 4),
            peak_memory=engine.peak_memory() if engine else 0,
            seconds={
                stage: round(spent, 3)
                for stage, spent in {**self._seconds.seconds(), **(engine.seconds if engine else {})}.items()
            },
            versions=_versions(),
        )
        self._database.save_run(run, self._settings.lease_seconds)

    def _close(self, status: str, *, worked: bool) -> None:
        """Keep the run's end and tell of it; a database that has failed has been reported already."""
        patience = self._settings.callback_patience
        patience = patience if status == "completed" else min(patience, 2)
        try:
            self._teller.close(status, patience)
            if worked:
                self._save(status)
            self._teller.finish(patience)
        except DatabaseFailed as exc:
            if status == "completed":
                raise
            log.warning("the run's end could not be written down: %s", exc)


def _check_wishes(engine: Engine, wishes: Sequence[Wishes]) -> None:
    """What the run wishes for every picture must be something the model can do: else none would succeed."""
    anybody = Prompt(claim=Claim(PromptId("str", "trial"), "trial", 0), text="a trial")
    try:
        engine.prepare(request(anybody, wishes))
    except PromptFailed as exc:
        raise ConfigurationError(f"the run's own parameters do not fit the model: {exc}") from None


def _versions() -> dict[str, str]:
    """What could matter for making the same pictures again."""
    known = {"python": platform.python_version(), "text2img": __version__}
    for name in ("torch", "diffusers", "transformers", "pymongo", "google-cloud-storage", "pillow"):
        with suppress(PackageNotFoundError):
            known[name] = version(name)
    return known
