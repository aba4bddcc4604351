"""Publish a run's metrics at a fixed interval while it works, and once more when it is over."""

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
    from text2img.telemetry.progress import RunStats
    from text2img.telemetry.tracing import Traces


log = logging.getLogger(__name__)

_TIMEOUT: Final = 5.0  # seconds for one query of the database, and for publishing to one sink
_FINAL_TIMEOUT: Final = 3.0  # seconds for all of the final publication
_FINAL_TIMEOUT_AFTER_FAILURE: Final = 0.8  # for a run that was stopped or failed: its shutdown is bounded


class MetricsSink(Protocol):
    """A destination of metrics."""

    name: str

    def publish(self, registry: CollectorRegistry, seconds: float) -> None:
        """Publish the metrics within ``seconds``; raises OSError."""
        ...


class MetricsPublisher:
    """Background thread that queries the database and publishes the metrics every ``interval`` seconds.

    It runs inside the ``with`` block; leaving the block publishes the run's end. Nothing here raises, and
    every query and publication has a timeout.
    """

    def __init__(
        self,
        collector: MetricsCollector,
        registry: CollectorRegistry,
        query: Callable[[], Backlog],
        sinks: Sequence[MetricsSink],
        interval: float,
    ) -> None:
        self._collector, self._registry, self._query = collector, registry, query
        self._sinks, self._interval = sinks, interval
        self._over = threading.Event()
        self._failing: set[str] = set()
        self._locks = {sink.name: threading.Lock() for sink in sinks}
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._over.set()
        self._collector.succeeded, self._collector.ended_at = kind is None, time.time()
        seconds = _FINAL_TIMEOUT if kind is None else _FINAL_TIMEOUT_AFTER_FAILURE
        try:
            run_with_timeout(seconds, lambda: self._publish_end(seconds))
        except TimeoutError:
            log.warning("the metrics of the run's end could not be published within %g s", seconds)

    def _publish_end(self, seconds: float) -> None:
        """Publish to all sinks in parallel: one that does not answer must not delay the others."""
        self._update_backlog(seconds / 3)
        threads = [
            threading.Thread(target=self._publish, args=(sink, seconds), daemon=True) for sink in self._sinks
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _run(self) -> None:
        while True:
            self._update_backlog(_TIMEOUT)
            for sink in self._sinks:
                if not self._over.is_set():
                    self._publish(sink, _TIMEOUT)
            if self._over.wait(self._interval):
                return

    def _update_backlog(self, seconds: float) -> None:
        try:
            self._collector.backlog = run_with_timeout(seconds, self._query)
        except (DatabaseFailed, TimeoutError) as exc:
            self._collector.backlog = None
            log.debug("the metrics are published without the database's backlog: %s", exc)

    def _publish(self, sink: MetricsSink, seconds: float) -> None:
        try:
            with self._locks[sink.name]:  # else an older state could arrive after a newer one
                sink.publish(self._registry, seconds)
        except Exception as exc:  # noqa: BLE001 - a sink's failure must not fail the run
            if sink.name not in self._failing:
                log.warning("%s: the metrics could not be published: %s", sink.name, exc)
            self._failing.add(sink.name)
        else:
            self._failing.discard(sink.name)


_TRACES_TIMEOUT: Final = 3.0  # seconds to send the last traces
_TRACES_TIMEOUT_AFTER_FAILURE: Final = 0.5  # for a run that was stopped or failed


class Published(Protocol):
    """The part of a job that is published."""

    stats: RunStats
    traces: Traces

    def spent(self) -> dict[str, float]:
        """Return the seconds so far, by stage."""
        ...

    def lost(self) -> int:
        """Return the number of claims that went to other workers so far."""
        ...


@contextmanager
def publishing(
    settings: Settings, job: Published, query: Callable[[], Backlog], instance: str
) -> Iterator[None]:
    """Publish the job's metrics inside this block, as the settings ask; close its traces at the end.

    ``query`` gets the database's backlog. ``instance`` names this process at a push gateway.
    """
    if settings.is_metrics_port_of_kubernetes:
        log.warning(
            "METRICS_PORT is passed over: it is %s, which Kubernetes sets for a Service called metrics;"
            " to serve metrics, use --metrics-port",
            settings.metrics_port,
        )
    closing: list[threading.Thread] = []
    with ExitStack() as stack:
        stack.callback(_join, closing)  # the traces are sent in parallel to the last metrics
        if is_enabled(settings):
            stack.enter_context(_metrics(settings, job, query, instance))
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            seconds = _TRACES_TIMEOUT if succeeded else _TRACES_TIMEOUT_AFTER_FAILURE
            send = partial(job.traces.close, seconds, succeeded=succeeded)
            closing.append(threading.Thread(target=send, name="traces", daemon=True))
            closing[0].start()


def _join(threads: Iterable[threading.Thread]) -> None:
    for thread in threads:
        thread.join()


@contextmanager
def _metrics(
    settings: Settings, job: Published, query: Callable[[], Backlog], instance: str
) -> Iterator[None]:
    sinks = metrics_sinks(settings, instance)
    from text2img.telemetry.metrics import MetricsCollector, listen, registry_of

    collector = MetricsCollector(job.stats, job.spent, job.lost, time.time() - job.stats.seconds)
    registry = registry_of(collector)
    with ExitStack() as stack:
        if settings.metrics_address is not None:
            stack.callback(listen(registry, *settings.metrics_address))
        stack.enter_context(MetricsPublisher(collector, registry, query, sinks, settings.metrics_seconds))
        yield


def metrics_sinks(settings: Settings, instance: str) -> list[MetricsSink]:
    """Return the sinks that the settings name, besides a port; raise ConfigurationError for invalid ones."""
    if not is_enabled(settings):
        return []
    try:
        from text2img.telemetry.metrics import Gateway, TextFile
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            f"metrics need {exc.name}, which is not installed; pip install 'prometheus-client>=0.22'"
        ) from exc
    sinks: list[MetricsSink] = []
    if settings.metrics_textfile:
        sinks.append(TextFile(settings.metrics_textfile))
    if settings.pushgateway:
        sinks.append(Gateway.parse(settings.pushgateway, instance))
    return sinks


def is_enabled(settings: Settings) -> bool:
    """Return True if the settings ask for metrics in any way."""
    return bool(settings.metrics_textfile or settings.pushgateway or settings.metrics_address)


RECEIVERS = {"callback": False, "webhooks": True}
"""The receivers of outcomes, each with True for prompts' own webhooks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """The work that waits in the database: claimable and postponed prompts, claims, and deliveries.

    ``workers`` counts live workers with claims, ``expired`` prompts whose lease expired. By receiver:
    ``undelivered`` outcomes that are in no notification yet, ``notifications`` still to be sent, and those
    ``refused`` permanently.
    """

    claimable: int
    postponed: int
    workers: int
    expired: int
    undelivered: Mapping[str, int]
    notifications: Mapping[str, int]
    refused: Mapping[str, int]


def query_backlog(database: Database, selection: Selection) -> Backlog:
    """Query the backlog of the selection; raises DatabaseFailed."""
    claims_by_worker = database.runs.claims_by_worker(selection)
    notifications = {name: database.outbox.notifications(webhooks=own) for name, own in RECEIVERS.items()}
    return Backlog(
        claimable=database.queue.pending(selection),
        postponed=database.queue.postponed(selection),
        workers=sum(claims.prompts > claims.expired for claims in claims_by_worker),
        expired=sum(claims.expired for claims in claims_by_worker),
        undelivered={name: database.outbox.undelivered(webhooks=own) for name, own in RECEIVERS.items()},
        notifications={name: due for name, (due, _) in notifications.items()},
        refused={name: refused for name, (_, refused) in notifications.items()},
    )
