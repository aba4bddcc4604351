"""Builds what publishes a run's figures from the settings."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from text2img.cli import parts, tasks
from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from text2img.cli.job import Job
    from text2img.databases import Database
    from text2img.settings import Settings
    from text2img.telemetry.publishing import Place

_LAST_TRACES, _IN_A_HURRY = 3.0, 0.5  # seconds to send the last traces; the latter of a run that ends early


@contextmanager
def publishing(settings: Settings, job: Job, database: Database) -> Iterator[None]:
    """Inside this block the job's figures are published wherever the settings say; its traces end with it."""
    last: list[threading.Thread] = []
    with ExitStack() as stack:
        stack.callback(_wait_for, last)  # sent beside the last figures, not after them
        if asked(settings):
            stack.enter_context(_figures(settings, job, database))
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            seconds = _LAST_TRACES if succeeded else _IN_A_HURRY
            send = partial(job.traces.close, seconds, succeeded=succeeded)
            last.append(threading.Thread(target=send, name="traces", daemon=True))
            last[0].start()


def _wait_for(threads: Iterable[threading.Thread]) -> None:
    for each in threads:
        each.join()


@contextmanager
def _figures(settings: Settings, job: Job, database: Database) -> Iterator[None]:
    places = check(settings)
    from text2img.telemetry.backlog import look
    from text2img.telemetry.figures import Figures
    from text2img.telemetry.prometheus import listen, registry_of
    from text2img.telemetry.publishing import Publishing

    figures = Figures(job.tally, job.spent, job.lost, time.time() - job.tally.seconds)
    registry = registry_of(figures)
    looks = partial(look, database, parts.selection(settings))
    with ExitStack() as stack:
        if settings.metrics_address is not None:
            stack.callback(listen(registry, *settings.metrics_address))
        stack.enter_context(Publishing(figures, registry, looks, places, settings.metrics_seconds))
        yield


def check(settings: Settings) -> list[Place]:
    """Where figures go besides a port; raises ConfigurationError for what cannot be."""
    if not asked(settings):
        return []
    try:
        from text2img.telemetry.prometheus import Gateway, TextFile
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            f"metrics need {exc.name}, which is not installed; pip install 'prometheus-client>=0.22'"
        ) from exc
    places: list[Place] = []
    if settings.metrics_textfile:
        places.append(TextFile(settings.metrics_textfile))
    if settings.pushgateway:
        places.append(Gateway.parse(settings.pushgateway, _instance()))
    return places


def _instance() -> str:
    """The task's index, where a platform gives one, else the host's name: a platform's hosts have another
    name each time, and a gateway forgets no group by itself.
    """
    index = tasks.find().index
    return socket.gethostname() if index is None else str(index)


def asked(settings: Settings) -> bool:
    """Whether anybody wants figures at all."""
    return bool(settings.metrics_textfile or settings.pushgateway or settings.metrics_port)
