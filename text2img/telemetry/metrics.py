"""A run's figures as Prometheus's metrics, made anew whenever somebody asks. Knows not who does.

Labels have few values each: no id of a prompt or a run, so that years of runs make no new series.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import unquote, urlsplit

from prometheus_client import CollectorRegistry, push_to_gateway, start_http_server, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import basic_auth_handler, default_handler
from prometheus_client.registry import Collector

from text2img.errors import ConfigurationError, ErrorCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

    from prometheus_client.core import Metric

    from text2img.telemetry.publisher import Backlog
    from text2img.telemetry.stats import RunStats


class MetricsCollector(Collector):
    """The metrics of one run: what it counts, ``spent`` seconds by stage, claims that it ``lost``.

    ``backlog`` is what waited in the database at the last look, None where that failed: then it is left out.
    ``succeeded`` stays None until the run is over. ``started_at`` and ``ended_at`` are Unix times.
    """

    def __init__(
        self,
        stats: RunStats,
        spent: Callable[[], Mapping[str, float]],
        lost: Callable[[], int],
        started_at: float,
    ) -> None:
        self._tally, self._spent, self._lost, self._started_at = stats, spent, lost, started_at
        self.backlog: Backlog | None = None
        self.succeeded: bool | None = None
        self.ended_at = 0.0

    def collect(self) -> Iterator[Metric]:
        """As they are now."""
        yield from self._counted()
        yield from self._timed()
        yield from self._ended()
        if self.backlog is not None:
            yield from _waiting(self.backlog)

    def _counted(self) -> Iterator[Metric]:
        stats = self._tally
        kinds = ("completed", "failed", "postponed", "iterated")
        outcomes = {kind: getattr(stats, kind) for kind in kinds}
        codes = {code.value: stats.failures[code] for code in ErrorCode}
        yield _counter("images", "Pictures that were stored and recorded.", stats.pictures)
        yield _counters("prompts", "Outcomes recorded, by kind.", "outcome", outcomes)
        yield _counters("prompt_failures", "Prompts that failed for good, by error code.", "code", codes)
        yield _counter("batches", "Batches that the device has worked on.", stats.batches)
        yield _counter("claims_lost", "Claims that ran out here and went to other workers.", self._lost())

    def _timed(self) -> Iterator[Metric]:
        stats = self._tally
        stages = "Seconds by stage; those beside the device are added up over threads."
        yield _counters("stage_seconds", stages, "stage", self._spent())
        yield _counter("device_busy_seconds", "Seconds in which the device had a batch.", stats.busy)
        share = "Share of the time from the first batch to the last in which the device had one."
        yield _gauge("device_busy_ratio", share, stats.device_busy)
        yield _gauge("run_start_time_seconds", "When the run began, as Unix time.", self._started_at)

    def _ended(self) -> Iterator[Metric]:
        if self.succeeded is not None:
            yield _gauge("run_end_time_seconds", "When the run ended, as Unix time.", self.ended_at)
            yield _gauge(
                "run_succeeded", "1: the run came to its end; 0: stopped, or failed.", self.succeeded
            )


def _waiting(backlog: Backlog) -> Iterator[Metric]:
    queue = {"claimable": backlog.claimable, "postponed": backlog.postponed}
    yield _gauges("queue_prompts", "Prompts that wait; claimable ones could be taken now.", "state", queue)
    yield _gauge("expired_leases", "Prompts whose worker has fallen silent.", backlog.expired)
    yield _gauge("workers", "Workers that hold prompts and are alive.", backlog.workers)
    undelivered = "Outcomes that are to be told and in no notice yet."
    yield _gauges("untold_outcomes", undelivered, "receiver", backlog.undelivered)
    yield _gauges("untold_notices", "Notices that are still to be sent.", "receiver", backlog.notifications)
    yield _gauges("refused_notices", "Notices refused for good.", "receiver", backlog.refused)


def _counter(name: str, meaning: str, value: float) -> Metric:
    return CounterMetricFamily(f"text2img_{name}", meaning, value=value)


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(f"text2img_{name}", meaning, value=float(value))


def _counters(name: str, meaning: str, label: str, values: Mapping[str, float]) -> Metric:
    return _labelled(CounterMetricFamily(f"text2img_{name}", meaning, labels=[label]), values)


def _gauges(name: str, meaning: str, label: str, values: Mapping[str, float]) -> Metric:
    return _labelled(GaugeMetricFamily(f"text2img_{name}", meaning, labels=[label]), values)


def _labelled(family: CounterMetricFamily | GaugeMetricFamily, values: Mapping[str, float]) -> Metric:
    for value in values:
        family.add_metric([value], values[value])
    return family


log = logging.getLogger(__name__)

_GROUP: Final = "/metrics/job/"


class TextFile:
    """A file for node_exporter's textfile collector; replaced as a whole, so that nobody reads half of it."""

    name = "--metrics-textfile"

    def __init__(self, path: str) -> None:
        folder = os.path.dirname(os.path.abspath(path))  # noqa: PTH100, PTH120 - no link is followed
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigurationError(f"{self.name} (METRICS_TEXTFILE): {folder} is no folder to write to")
        self._path = path

    def publish(self, registry: CollectorRegistry, seconds: float) -> None:
        """Write the file anew; raises OSError."""
        del seconds
        write_to_textfile(self._path, registry)


@dataclass(frozen=True, slots=True)
class Gateway:
    """A Pushgateway, and the group of series there that is this run's. Its credentials are not shown."""

    url: str
    job: str
    group: Mapping[str, str]
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    name = "--pushgateway"

    @classmethod
    def parse(cls, url: str, instance: str) -> Self:
        """The gateway of a URL, which may name the group itself: …/metrics/job/JOB/LABEL/VALUE.

        Else the group is job ``text2img`` and this instance. Raises ConfigurationError, which does not show
        the URL.
        """
        try:
            parts = urlsplit(url)
            port = "" if parts.port is None else f":{parts.port}"
        except ValueError:
            parts, port = urlsplit(""), ""
        base, _, named = parts.path.partition(_GROUP)
        job, *pairs = named.strip("/").split("/")
        if parts.scheme not in {"http", "https"} or not parts.hostname or len(pairs) % 2:
            raise ConfigurationError(
                "--pushgateway (PUSHGATEWAY): it should be http://HOST:PORT or https://HOST:PORT, and may "
                "go on with /metrics/job/JOB and pairs of /LABEL/VALUE"
            )
        names, values = pairs[::2], map(unquote, pairs[1::2])
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return cls(
            f"{parts.scheme}://{host}{port}{base}",
            unquote(job) or "text2img",
            dict(zip(names, values, strict=True)) if job else {"instance": instance},
            unquote(parts.username or ""),
            unquote(parts.password or ""),
        )

    def publish(self, registry: CollectorRegistry, seconds: float) -> None:
        """Replace the group at the gateway within ``seconds``; raises OSError."""
        push_to_gateway(self.url, self.job, registry, dict(self.group), seconds, self._send)

    def _send(self, **request: Any) -> Callable[[], None]:
        if not self.user:
            return default_handler(**request)
        return basic_auth_handler(**request, username=self.user, password=self.password)


def registry_of(figures: MetricsCollector) -> CollectorRegistry:
    """A registry of these figures alone: what the libraries beside us count is not ours to publish."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(figures)
    return registry


def listen(registry: CollectorRegistry, host: str, port: int) -> Callable[[], None]:
    """Answer at /metrics; returns what ends it. Raises ConfigurationError where the port is not free."""
    try:
        server, _ = start_http_server(port, host, registry)
    except (OSError, OverflowError) as exc:
        reason = getattr(exc, "strerror", None) or "there is no such port"
        raise ConfigurationError(f"--metrics-port (METRICS_PORT): {host}:{port}: {reason}") from exc
    log.info("metrics at http://%s:%d/metrics", host, server.server_port)

    def close() -> None:
        server.shutdown()
        server.server_close()

    return close
