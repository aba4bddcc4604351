"""Publishes a run's figures every so many seconds while it works, and once more when it is over."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, Self

from text2img.concurrency.timeouts import run_with_timeout
from text2img.errors import ConfigurationError, DatabaseFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from prometheus_client import CollectorRegistry

    from text2img.databases import Database, Selection
    from text2img.settings import Settings
    from text2img.telemetry.metrics import MetricsCollector
    from text2img.telemetry.stats import RunStats
    from text2img.telemetry.tracing import Traces


log = logging.getLogger(__name__)

_A_TURN: Final = 5.0  # seconds for one look at the database, and for one place
_AT_THE_END: Final = 3.0  # seconds that all of it may take once the run is over
_IN_A_HURRY: Final = 0.8  # the same for a run that was stopped or has failed: its end has a bound of its own


class MetricsSink(Protocol):
    """Where figures go."""

    name: str

    def publish(self, registry: CollectorRegistry, seconds: float) -> None:
        """Put them there, within so many seconds; raises OSError."""
        ...


class MetricsPublisher:
    """Inside the ``with`` block a thread looks at the database and publishes, ``every`` so many seconds.

    Leaving it publishes the end. Nothing here raises, and nothing waits for what does not answer.
    """

    def __init__(
        self,
        figures: MetricsCollector,
        registry: CollectorRegistry,
        look: Callable[[], Backlog],
        places: Sequence[MetricsSink],
        every: float,
    ) -> None:
        self._figures, self._registry, self._look = figures, registry, look
        self._places, self._every = places, every
        self._over = threading.Event()
        self._silent: set[str] = set()
        self._turns = {place.name: threading.Lock() for place in places}
        self._thread = threading.Thread(target=self._keep, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._over.set()
        self._figures.succeeded, self._figures.ended_at = kind is None, time.time()
        seconds = _AT_THE_END if kind is None else _IN_A_HURRY
        try:
            run_with_timeout(seconds, lambda: self._end(seconds))
        except TimeoutError:
            log.warning("the metrics of the run's end could not be published within %g s", seconds)

    def _end(self, seconds: float) -> None:
        """Each place by itself: one that does not answer must not cost another its last figures."""
        self._look_again(seconds / 3)
        turns = [
            threading.Thread(target=self._publish, args=(place, seconds), daemon=True)
            for place in self._places
        ]
        for turn in turns:
            turn.start()
        for turn in turns:
            turn.join()

    def _keep(self) -> None:
        while True:
            self._look_again(_A_TURN)
            for place in self._places:
                if not self._over.is_set():
                    self._publish(place, _A_TURN)
            if self._over.wait(self._every):
                return

    def _look_again(self, seconds: float) -> None:
        try:
            self._figures.backlog = run_with_timeout(seconds, self._look)
        except (DatabaseFailed, TimeoutError) as exc:
            self._figures.backlog = None
            log.debug("what waits in the database is left out of the metrics: %s", exc)

    def _publish(self, place: MetricsSink, seconds: float) -> None:
        try:
            with self._turns[place.name]:  # else an older state could arrive after a newer one
                place.publish(self._registry, seconds)
        except Exception as exc:  # noqa: BLE001 - whatever a place does, the run is about pictures
            if place.name not in self._silent:
                log.warning("%s: the metrics could not be published: %s", place.name, exc)
            self._silent.add(place.name)
        else:
            self._silent.discard(place.name)


_LAST_TRACES, _LAST_TRACES_OF_A_FAILED_RUN = (
    3.0,
    0.5,
)  # seconds to send the last traces; the latter of a run that ends early


class Published(Protocol):
    """What of a job is published."""

    stats: RunStats
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
            seconds = _LAST_TRACES if succeeded else _LAST_TRACES_OF_A_FAILED_RUN
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
    from text2img.telemetry.metrics import MetricsCollector, listen, registry_of

    figures = MetricsCollector(job.stats, job.spent, job.lost, time.time() - job.stats.seconds)
    registry = registry_of(figures)
    with ExitStack() as stack:
        if settings.metrics_address is not None:
            stack.callback(listen(registry, *settings.metrics_address))
        stack.enter_context(MetricsPublisher(figures, registry, look, places, settings.metrics_seconds))
        yield


def check(settings: Settings, instance: str) -> list[MetricsSink]:
    """Where figures go besides a port; raises ConfigurationError for what cannot be."""
    if not asked(settings):
        return []
    try:
        from text2img.telemetry.metrics import Gateway, TextFile
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            f"metrics need {exc.name}, which is not installed; pip install 'prometheus-client>=0.22'"
        ) from exc
    places: list[MetricsSink] = []
    if settings.metrics_textfile:
        places.append(TextFile(settings.metrics_textfile))
    if settings.pushgateway:
        places.append(Gateway.parse(settings.pushgateway, instance))
    return places


def asked(settings: Settings) -> bool:
    """Whether anybody wants figures at all."""
    return bool(settings.metrics_textfile or settings.pushgateway or settings.metrics_port)


RECEIVERS = {"callback": False, "webhooks": True}
"""Who is told, and whether these are prompts' own webhooks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """Prompts of the selection that can be claimed now or later, claims, and what is still to be told.

    ``untold`` outcomes are in no notice yet; ``notices`` are kept and not told, ``refused`` told of no more.
    """

    claimable: int
    postponed: int
    workers: int
    expired: int
    undelivered: Mapping[str, int]
    notifications: Mapping[str, int]
    refused: Mapping[str, int]


def look(database: Database, selection: Selection) -> Backlog:
    """How it stands; raises DatabaseFailed."""
    claims_by_worker = database.claims_by_worker(selection)
    notifications = {name: database.notifications(webhooks=own) for name, own in RECEIVERS.items()}
    return Backlog(
        claimable=database.pending(selection),
        postponed=database.postponed(selection),
        workers=sum(each.prompts > each.expired for each in claims_by_worker),
        expired=sum(each.expired for each in claims_by_worker),
        undelivered={name: database.undelivered(webhooks=own) for name, own in RECEIVERS.items()},
        notifications={name: due for name, (due, _) in notifications.items()},
        refused={name: refused for name, (_, refused) in notifications.items()},
    )
