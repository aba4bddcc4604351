"""One run of the job: what is checked before the first claim, the work, what is kept and told afterwards."""

from __future__ import annotations

import logging
import os
import platform
import threading
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from text2img import __version__
from text2img.cli import parts, tasks, wishes
from text2img.cli.last_line import last_line, remaining
from text2img.databases.patient import patient
from text2img.deadline import within
from text2img.errors import DatabaseFailed, RunFailed, Stopped, StorageFailed
from text2img.guard import Guard
from text2img.leases import Leases
from text2img.stages import Stopwatch
from text2img.tally import Tally
from text2img.worker import Parts, Plan, Worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from text2img.databases import Database, Run
    from text2img.engine import Engine
    from text2img.progress import Progress
    from text2img.prompts import Wishes
    from text2img.serving import Serving
    from text2img.settings import Settings
    from text2img.stages import Stop
    from text2img.storage import ImageStorage

log = logging.getLogger("text2img.run")

_TOLD_EVERY = 2.0  # seconds that a server's outcomes wait for others, to be told together
_LAST_WORDS = 3.0  # seconds for a run that has failed, or was stopped, to write that down and tell of it


class Job:
    """One run: what is checked before the first claim, the worker, what is kept and told afterwards.

    With ``serving`` it is a server's: the model is loaded though nothing waits, and the end is the server's.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        storage: ImageStorage,
        stop: Stop,
        serving: Serving | None = None,
    ) -> None:
        self._serving = serving
        self._settings, self._database, self._storage, self._stop = settings, database, storage, stop
        self._selection = parts.selection(settings)
        self._name = parts.worker_name()
        self._run = tasks.new_run(settings.run_id)
        every = None if serving is None else _TOLD_EVERY
        self._teller = parts.teller(settings, database, self._run.id, self._name, every=every)
        self._leases = Leases(database, settings.lease_seconds, lambda: self._save("running"))
        self._seconds = Stopwatch()
        self._engine: Engine | None = None
        self._ended: str | None = None
        self.tally = Tally()

    def carry_out(self, progress: Progress) -> None:
        """Run, and print the one line at the end, whatever the end."""
        try:
            with Guard(self._stop, self._settings.stall_timeout, self.give_up) as guard:
                self.run(progress, guard)
                self._look_over()
        except (Stopped, RunFailed):
            self.conclude(1)
            raise
        print(self.summary())

    def run(self, progress: Progress, guard: Guard) -> None:
        """Work through what is pending. A run that finds nothing touches neither storage nor model."""
        waiting = self._database.pending(self._selection)
        log.info("prompts waiting: %d", waiting, extra={"event": "start", "run_id": self._run.id})
        status, worked = "failed", waiting > 0 or self._serving is not None
        progress = self._teller.following(progress)
        self._teller.start()
        try:
            if worked:
                self._work(waiting, progress, guard)
            status = "completed"
        except (Stopped, RunFailed):
            status = "stopped" if self._stop.event.is_set() else "failed"
            self._stop.check()  # what fails while a run is being stopped is not what it ends of
            raise
        finally:
            progress.end()
            self._ended = status
            self._close(status, worked=worked)
        self._stop.check()

    def summary(self) -> str:
        """The one line that a run ends with."""
        left, later = self._database.counts(self._selection), self._database.postponed(self._selection)
        return self._line(remaining(left, later))

    def conclude(self, seconds: float) -> None:
        """Print the line of a run that ends early, with what the database says of it within ``seconds``.

        Never raises: how the run ended must not be hidden by what comes after.
        """
        line = self._line("unknown")
        with suppress(Exception):
            line = within(seconds, self.summary)
        with suppress(OSError):
            print(line, flush=True)

    def _line(self, left: str) -> str:
        return last_line(self.tally, self._spent(), left, self._settings.output_url)

    def _spent(self) -> dict[str, float]:
        """Seconds so far, by stage."""
        return {**self._seconds.seconds(), **(self._engine.seconds if self._engine else {})}

    def give_up(self, status: int) -> None:
        """The last resort: give back what is claimed, if that takes no time, and leave at once."""
        with suppress(Exception):
            within(1, self._leases.release)
        with suppress(Exception):
            within(0.5, lambda: self._save(self._ended or ("failed" if status == 1 else "stopped")))
        self.conclude(0)
        logging.shutdown()
        os._exit(status)

    def _work(self, waiting: int, progress: Progress, guard: Guard) -> None:
        self._save("running")
        progress.begin(None if self._serving else min(waiting, self._settings.limit or waiting))
        encoder, evaluator = parts.encoder(self._settings), parts.evaluator(self._settings)
        self._storage.check()
        if evaluator is not None:
            evaluator.check()
        configuration = self._database.model_configuration(self._settings.model_config_id)
        engine = self._engine = parts.engine(self._settings, configuration, self._stop.wait)
        card = engine.inspect()
        self._run = replace(self._run, model=card.name)
        wished = wishes.for_all(self._settings, card, configuration)
        wishes.checked(self._settings, card, wished)
        database = patient(self._database, self._settings.database_patience, self._stop.wait)
        worker_parts = Parts(
            database=database,
            storage=self._storage,
            engine=engine,
            card=card,
            leases=self._leases,
            guard=guard,
            progress=progress,
            seconds=self._seconds,
            recorded=self._teller.recorded,
            encoder=encoder,
            evaluator=evaluator,
            sidecars=parts.sidecars(self._settings, self._storage, database.holds),
            loras=parts.loras(self._settings, self._stop.wait),
            webhook_hosts=parts.webhook_hosts(self._settings),
            serving=self._serving,
        )
        with self._serving or nullcontext():
            Worker(worker_parts, self._plan(wished, card.multiple, waiting), self._stop, self.tally).run()
        engine.close()  # telling may take a while, which needs no weights

    def _look_over(self) -> None:
        """Write what there is to look at; the work is done and told of, so that it cannot fail the run."""
        if not self._settings.folders or not self.tally.settled:
            return
        from text2img.overview import Overview

        overview = Overview(self._database, self._storage, self._stop.check)
        try:
            overview.write(self._state("completed"), self._selection, self._settings.loop)
        except (DatabaseFailed, StorageFailed) as exc:
            log.warning("the run's summary and contact sheet could not be written: %s", exc)

    def _plan(self, wished: Sequence[Wishes], multiple: int, waiting: int) -> Plan:
        settings = self._settings
        return Plan(
            run_id=self._run.id,
            worker=self._name,
            selection=self._selection,
            wishes=wished,
            batch_size=settings.batches.most,
            fastest_size=settings.batches.auto,
            waiting=waiting,
            limit=settings.limit,
            max_attempts=settings.max_attempts,
            upload_workers=settings.upload_workers,
            tell=settings.callback_url is not None,
            multiple=multiple,
            object_name=settings.object_names,
            loop=settings.loop,
        )

    def _save(self, status: str) -> None:
        """Write down how the run stands; while it runs this also says that it is alive."""
        self._database.save_run(self._state(status), self._settings.lease_seconds)

    def _state(self, status: str) -> Run:
        tally, engine = self.tally, self._engine
        return replace(
            self._run,
            status=status,
            finished_at=None if status == "running" else datetime.now(UTC),
            completed=tally.completed,
            failed=tally.failed,
            images=tally.pictures,
            postponed=tally.postponed,
            images_per_second=round(tally.images_per_second, 4),
            steady_images_per_second=round(tally.steady_images_per_second, 4),
            device_busy=round(tally.device_busy, 4),
            device_busy_of_run=round(tally.device_busy_of_run, 4),
            # Not before the first batch: while its libraries are being imported, an engine cannot say.
            peak_memory=engine.peak_memory() if engine and tally.made else 0,
            seconds={stage: round(spent, 3) for stage, spent in self._spent().items()},
            versions=_versions(),
        )

    def _close(self, status: str, *, worked: bool) -> None:
        """Keep the run's end and tell of it; a database that has failed has been reported already."""
        try:
            if status == "completed":
                self._end(status, self._settings.callback_patience, self._stop.event, worked=worked)
            else:
                patience = min(self._settings.callback_patience, 2)
                within(_LAST_WORDS, lambda: self._end(status, patience, threading.Event(), worked=worked))
        except (DatabaseFailed, TimeoutError) as exc:
            if status == "completed":
                self._stop.check()
                raise
            log.warning("the run's end could not be written down: %s", exc)

    def _end(self, status: str, patience: float, stop: threading.Event, *, worked: bool) -> None:
        self._teller.close(status, patience)
        if worked:
            self._save(status)
        self._teller.finish(patience, stop)


def _versions() -> dict[str, str]:
    """What could matter for making the same pictures again."""
    known = {"python": platform.python_version(), "text2img": __version__}
    for name in (
        "torch",
        "diffusers",
        "transformers",
        "peft",
        "pymongo",
        "google-cloud-storage",
        "boto3",
        "pillow",
    ):
        with suppress(PackageNotFoundError):
            known[name] = version(name)
    return known
