"""A run's figures as Prometheus's metrics, made anew whenever somebody asks. Knows not who does.

Labels have few values each: no id of a prompt or a run, so that years of runs make no new series.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from text2img.errors import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from prometheus_client.core import Metric

    from text2img.telemetry.backlog import Backlog
    from text2img.telemetry.stats import Tally


class Figures(Collector):
    """The metrics of one run: what it counts, ``spent`` seconds by stage, claims that it ``lost``.

    ``backlog`` is what waited in the database at the last look, None where that failed: then it is left out.
    ``succeeded`` stays None until the run is over. ``started_at`` and ``ended_at`` are Unix times.
    """

    def __init__(
        self,
        tally: Tally,
        spent: Callable[[], Mapping[str, float]],
        lost: Callable[[], int],
        started_at: float,
    ) -> None:
        self._tally, self._spent, self._lost, self._started_at = tally, spent, lost, started_at
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
        tally = self._tally
        kinds = ("completed", "failed", "postponed", "iterated")
        outcomes = {kind: getattr(tally, kind) for kind in kinds}
        codes = {code.value: tally.failures[code] for code in ErrorCode}
        yield _counter("images", "Pictures that were stored and recorded.", tally.pictures)
        yield _counters("prompts", "Outcomes recorded, by kind.", "outcome", outcomes)
        yield _counters("prompt_failures", "Prompts that failed for good, by error code.", "code", codes)
        yield _counter("batches", "Batches that the device has worked on.", tally.batches)
        yield _counter("claims_lost", "Claims that ran out here and went to other workers.", self._lost())

    def _timed(self) -> Iterator[Metric]:
        tally = self._tally
        stages = "Seconds by stage; those beside the device are added up over threads."
        yield _counters("stage_seconds", stages, "stage", self._spent())
        yield _counter("device_busy_seconds", "Seconds in which the device had a batch.", tally.busy)
        share = "Share of the time from the first batch to the last in which the device had one."
        yield _gauge("device_busy_ratio", share, tally.device_busy)
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
    untold = "Outcomes that are to be told and in no notice yet."
    yield _gauges("untold_outcomes", untold, "receiver", backlog.untold)
    yield _gauges("untold_notices", "Notices that are still to be sent.", "receiver", backlog.notices)
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
