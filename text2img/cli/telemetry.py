"""Builds what publishes a run's figures from the settings."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from text2img.cli import parts
from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from text2img.cli.job import Job
    from text2img.databases import Database
    from text2img.settings import Settings
    from text2img.telemetry.publishing import Place


@contextmanager
def publishing(settings: Settings, job: Job, database: Database) -> Iterator[None]:
    """Inside this block the job's figures are published wherever the settings say; else nothing happens."""
    if not _asked(settings):
        yield
        return
    places = check(settings)
    from text2img.telemetry.backlog import look
    from text2img.telemetry.figures import Figures
    from text2img.telemetry.prometheus import listen, registry_of
    from text2img.telemetry.publishing import Publishing

    figures = Figures(job.tally, job.spent, job.lost, job.started_at.timestamp())
    registry = registry_of(figures)
    looks = partial(look, database, parts.selection(settings))
    with ExitStack() as stack:
        if settings.metrics_address is not None:
            stack.callback(listen(registry, *settings.metrics_address))
        stack.enter_context(Publishing(figures, registry, looks, places, settings.metrics_seconds))
        yield


def check(settings: Settings) -> list[Place]:
    """Where figures go besides a port; raises ConfigurationError for what cannot be."""
    if not _asked(settings):
        return []
    try:
        from text2img.telemetry.prometheus import Gateway, TextFile
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            f"metrics need {exc.name}, which is not there: pip install 'text2img[metrics]'"
        ) from exc
    places: list[Place] = []
    if settings.metrics_textfile:
        places.append(TextFile(settings.metrics_textfile))
    if settings.pushgateway:
        places.append(Gateway.parse(settings.pushgateway, os.environ))
    return places


def _asked(settings: Settings) -> bool:
    return bool(settings.metrics_textfile or settings.pushgateway or settings.metrics_port)
