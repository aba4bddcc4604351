"""``serve``: run until stopped, on prompts from the database and, if one is set, from RabbitMQ."""

from __future__ import annotations

import threading
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from text2img.cli.run import add, prepare
from text2img.concurrency.signals import Stop, graceful_shutdown
from text2img.errors import ConfigurationError
from text2img.telemetry.publisher import publishing, query_backlog
from text2img.worker import build
from text2img.worker.job import Job, LocalExecutor, task_instance
from text2img.worker.polling import Admission, PollingLoop

if TYPE_CHECKING:
    import argparse

    from text2img.intake.rabbitmq import Broker
    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress
    from text2img.worker.polling import Intake


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Serve until stopped or idle; return the exit status, which failed prompts do not change."""
    del arguments
    if settings.limit is not None:
        raise ConfigurationError(
            "--limit (LIMIT) is an option of run: serve works until it is stopped, or idle for --idle-exit"
        )
    stop, arrived = Stop(), threading.Event()
    deps, prompts = prepare(settings, stop)
    broker = build.broker(settings)
    build.check_device(settings)
    build.require_database(settings, may_create=broker is not None)
    with closing(build.database(settings)) as database, graceful_shutdown(stop):

        def wake_notifier() -> None:
            job.wake_notifier()  # called once the job's work has begun

        admission = Admission(database, deps.webhook_hosts, arrived=arrived.set, notify=wake_notifier)
        job = Job(
            settings,
            deps,
            database,
            executor=LocalExecutor(settings, deps),
            stop=stop,
            serving=_serving(settings, broker, admission, stop, arrived),
        )
        add(database, prompts)
        backlog = partial(query_backlog, database, deps.selection)
        with publishing(settings, job, backlog, task_instance()):
            job.run(progress)
    return 0


def _serving(
    settings: Settings, broker: Broker | None, admission: Admission, stop: Stop, arrived: threading.Event
) -> PollingLoop:
    return PollingLoop(
        stop,
        arrived,
        poll_seconds=settings.poll_seconds,
        idle_exit=settings.idle_exit,
        intake=None if broker is None else _intake(settings, broker, admission, stop),
    )


def _intake(settings: Settings, broker: Broker, admission: Admission, stop: Stop) -> Intake:
    from text2img.intake.entries import MessageReader
    from text2img.intake.rabbitmq import Consumer

    reader = MessageReader(settings.dataset_id)
    return Consumer(broker, reader, admission.add, stop, reject=admission.reject)
