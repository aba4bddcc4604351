"""``run``: the one-shot job, from the settings to the exit status."""

from __future__ import annotations

import logging
from contextlib import closing
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final

from text2img.errors import DatabaseFailed, PromptFailed, StorageFailed
from text2img.intake import read_prompts
from text2img.telemetry.backlog import look
from text2img.telemetry.setup import check, publishing
from text2img.worker import build, platform_task
from text2img.worker.job import Job
from text2img.worker.local import Single
from text2img.worker.watchdog import stopping

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from text2img.concurrency.stages import Stop
    from text2img.databases import Database, Run
    from text2img.intake import Prompts
    from text2img.settings import Settings
    from text2img.storage import ImageStorage
    from text2img.telemetry.progress import Progress
    from text2img.worker.local import Labour

_AT_ONCE: Final = 1000
log = logging.getLogger("text2img.run")


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Do the job; the exit status."""
    storage, prompts = prepare(settings)
    if arguments.dry_run:
        from text2img.cli.dry_run import show

        return show(settings, prompts)
    if settings.ray_address is None or settings.workers is None:
        build.check_device(settings)
    return work(settings, storage, progress, prompts)


def prepare(settings: Settings) -> tuple[ImageStorage, Prompts | None]:
    """What can be known of the settings without asking anybody: the storage, and the input file's prompts.

    Raises ConfigurationError for whatever is wrong with them.
    """
    _ = settings.database_url
    storage = build.storage(settings)
    build.receiver(settings)
    build.webhooks(settings)
    build.encoder(settings)
    build.loras(settings)
    build.evaluator(settings)
    _ = settings.object_names, settings.loop
    build.check_workers(settings)
    check(settings, platform_task.instance())
    return storage, read_prompts(settings.input_file) if settings.input_file else None


def work(
    settings: Settings, storage: ImageStorage, progress: Progress, prompts: Prompts | None = None
) -> int:
    """Run the job on these parts, with these prompts added first, and print its one line; the exit status."""
    with closing(build.database(settings)) as database, stopping() as stop:
        add(database, prompts)
        job = Job(settings, database, labour(settings, database, storage, stop), stop)
        with publishing(
            settings, job, partial(look, database, build.selection(settings)), platform_task.instance()
        ):
            job.carry_out(progress, overview(settings, database, storage, stop))
    return 3 if job.tally.failed else 0


def overview(
    settings: Settings, database: Database, storage: ImageStorage, stop: Stop
) -> Callable[[Run], None] | None:
    """What writes the things to look at, in a layout of folders."""
    if not settings.folders:
        return None

    def write(run: Run) -> None:
        from text2img.reports.run_summary import Overview

        try:
            Overview(database, storage, stop.check).write(run, build.selection(settings), settings.loop)
        except (DatabaseFailed, StorageFailed, PromptFailed) as exc:  # the last: a file of its own is refused
            log.warning("the run's summary and contact sheet could not be written: %s", exc)

    return write


def labour(settings: Settings, database: Database, storage: ImageStorage, stop: Stop) -> Labour:
    """Who does the work: one worker in this process, or several in processes of their own."""
    if settings.workers is None:
        return Single(settings, database, storage, stop)
    from text2img.worker.ray.pool import Crew

    return Crew(settings, database, stop)


def add(database: Database, prompts: Prompts | None) -> None:
    """The input file's prompts: those that are new, and those that were changed."""
    if not prompts:
        return
    added = revised = 0
    waiting = iter(prompts)
    while chunk := list(islice(waiting, _AT_ONCE)):
        added += database.enqueue(chunk)
        revised += database.revise(chunk)
    log.info("of %d prompts %d are new and %d have changed", len(prompts), added, revised)
