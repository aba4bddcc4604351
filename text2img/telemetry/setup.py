"""Builds what publishes a run's figures from the settings."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from text2img.settings import Settings
    from text2img.telemetry.backlog import Backlog
    from text2img.telemetry.publisher import Place
    from text2img.telemetry.stats import Tally
    from text2img.telemetry.tracing import Traces

_LAST_TRACES, _IN_A_HURRY = 3.0, 0.5  # seconds to send the last traces; the latter of a run that ends early


class Published(Protocol):
    """What of a job is published."""

    tally: Tally
    traces: Traces

    def spent(self) -> dict[str, float]:
        """Seconds so far, by stage."""
        ...

    def lost(self) -> int:
        """How many claims went to other workers so far."""
        ...


@contextmanager
def publishing(
    settings: Settings, job: Published, look: Callable[[], Backlog], instance: str
) -> Iterator[None]:
    """Inside this block the job's figures are published wherever the settings say; its traces end with it.

    ``look`` queries what waits in the database. ``instance`` names this process at a push gateway.
    """
    last: list[threading.Thread] = []
    with ExitStack() as stack:
        stack.callback(_wait_for, last)  # sent beside the last figures, not after them
        if asked(settings):
            stack.enter_context(_figures(settings, job, look, instance))
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
def _figures(
    settings: Settings, job: Published, look: Callable[[], Backlog], instance: str
) -> Iterator[None]:
    places = check(settings, instance)
    from text2img.telemetry.metrics import Figures
    from text2img.telemetry.prometheus import listen, registry_of
    from text2img.telemetry.publisher import Publishing

    figures = Figures(job.tally, job.spent, job.lost, time.time() - job.tally.seconds)
    registry = registry_of(figures)
    with ExitStack() as stack:
        if settings.metrics_address is not None:
            stack.callback(listen(registry, *settings.metrics_address))
        stack.enter_context(Publishing(figures, registry, look, places, settings.metrics_seconds))
        yield


def check(settings: Settings, instance: str) -> list[Place]:
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
        places.append(Gateway.parse(settings.pushgateway, instance))
    return places


def asked(settings: Settings) -> bool:
    """Whether anybody wants figures at all."""
    return bool(settings.metrics_textfile or settings.pushgateway or settings.metrics_port)
