"""Traces of a run: the interface that the flow reports to, and the recorder of batches and their stages.

The standard OTEL variables enable them; OpenTelemetry is imported only then.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import unquote

from text2img.errors import PromptFailed
from text2img.prompts import Claim, Request
from text2img.telemetry.progress import MultiProgress, NullProgress

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from opentelemetry.trace import Span

    from text2img.prompts import Outcome
    from text2img.telemetry.otel import SdkTracer
    from text2img.telemetry.progress import Progress


log = logging.getLogger(__name__)

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_HEADERS: Final = ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS")


class Traces:
    """A receiver of what a job does and when. Its own methods record nothing; TraceRecorder records spans."""

    def device(self, stage: str, started: float) -> None:
        """Record device time since ``started`` (``time.monotonic``) in ``stage``, for no batch."""

    def generated(
        self,
        batch: Sequence[Request],
        results: Sequence[object] | None,
        spent: Mapping[str, float],
        started: float,
    ) -> None:
        """Record a batch on the device since ``started``, with ``spent`` seconds on each stage in turn.

        ``results``: an image or a PromptFailed for each request; None where the device failed.
        """

    def wrap_progress(self, progress: Progress) -> Progress:
        """Return a progress that also reports recorded outcomes to these traces."""
        return progress

    def stage(self, stage: str, subjects: Sequence[object], started: float, ended: float) -> None:
        """Record a stage's time (``time.monotonic``) and the requests or outcomes it was for, if known."""

    def close(self, seconds: float, *, succeeded: bool) -> None:
        """End the run's trace, and send the remaining spans within ``seconds``. Never raises."""


class NoopTraces(Traces):
    """Traces that record nothing, for a run without tracing."""


def traces(environment: Mapping[str, str], run_id: str, *, long_running: bool) -> Traces:
    """Return the traces that the standard OTEL variables configure.

    The spans of a ``long_running`` run have no common parent.
    """
    names = _exporter_names(environment)
    if not names:
        return NoopTraces()
    try:
        from text2img.telemetry.otel import tracer
    except ModuleNotFoundError:
        log.info(
            "the OTEL variables enable traces, but OpenTelemetry is not installed; "
            "pip install 'opentelemetry-sdk>=1.35' 'opentelemetry-exporter-otlp-proto-http>=1.35'"
        )
        return NoopTraces()
    sdk_tracer = tracer(names, environment)
    if sdk_tracer is None:
        return NoopTraces()
    return TraceRecorder(sdk_tracer, run_id, long_running=long_running)


def secrets(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the secrets in the OTEL variables: headers' values, and URLs with a password or a query."""
    yield from (url for name in _ENDPOINTS if {"@", "?"} & set(url := environment.get(name, "")))
    for name in _HEADERS:
        for header in environment.get(name, "").split(","):
            value = header.partition("=")[2].strip()
            yield from {value, unquote(value), unquote(value).rpartition(" ")[2]} - {""}


def _exporter_names(environment: Mapping[str, str]) -> list[str]:
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    names = environment.get("OTEL_TRACES_EXPORTER", "")
    if not names and any(environment.get(name) for name in _ENDPOINTS):
        names = "otlp"
    return [name for part in names.split(",") if (name := part.strip()) not in {"", "none"}]


_MAX_OPEN_BATCHES: Final = 32  # a batch whose claims were lost would never end

_MIN_SPAN_SECONDS: Final = 0.001  # shorter engine stages have no span

_ImageKey = tuple[Claim, int]
"""An image's claim, and its number among the prompt's images."""


@dataclass(slots=True)
class _Stage:
    """One stage of one batch, which several threads may share: from the first start to the last end."""

    began: float
    ended: float
    seconds: float = 0.0


@dataclass(slots=True)
class _Batch:
    """A batch with outcomes that are not recorded yet; ``open_images`` are the images of those outcomes."""

    span: Span
    ended: float
    open_images: set[_ImageKey]
    stages: dict[str, _Stage] = field(default_factory=dict)

    def add(self, stage: str, started: float, ended: float) -> None:
        times = self.stages.setdefault(stage, _Stage(started, ended))
        times.began, times.ended = min(times.began, started), max(times.ended, ended)
        times.seconds += ended - started
        self.ended = max(self.ended, ended)


class TraceRecorder(Traces, NullProgress):
    """Recorder of one run's spans. A batch's span ends when its last outcome is recorded."""

    def __init__(self, tracer: SdkTracer, run_id: str, *, long_running: bool) -> None:
        self._tracer, self._run = tracer, {"text2img.run.id": run_id}
        self._root = None if long_running else tracer.begin("run", time.monotonic(), None, self._run)
        self._lock = threading.Lock()
        self._batches: dict[int, _Batch] = {}
        self._last_number = 0
        self._batch_of: dict[Claim, dict[int, int]] = {}  # claim → image number → batch number

    def wrap_progress(self, progress: Progress) -> Progress:
        """See Traces.wrap_progress."""
        return MultiProgress(progress, self)

    def stage(self, stage: str, subjects: Sequence[object], started: float, ended: float) -> None:
        """See Traces.stage. Time spent on an open batch is added to it; any other time has its own span."""
        with self._lock:
            batches = {
                number for subject in subjects for number in self._batch_numbers(subject)
            } & self._batches.keys()
            for number in batches:
                self._batches[number].add(stage, started, ended)
        if not batches:
            self._span(stage, self._root, started, ended)

    def generated(
        self,
        batch: Sequence[Request],
        results: Sequence[object] | None,
        spent: Mapping[str, float],
        started: float,
    ) -> None:
        """See Traces.generated."""
        ended = time.monotonic()
        attributes = {**self._run, **_attributes(batch, results)}
        span = self._tracer.begin("batch", started, self._root, attributes)
        for stage, seconds in spent.items():
            if seconds < _MIN_SPAN_SECONDS:
                continue
            stage_end = min(ended, started + seconds)
            self._span(stage, span, started, stage_end)
            started = stage_end
        if results is None:
            self._tracer.end(span, ended, failed=True)
            return
        with self._lock:
            images = {(request.prompt.claim, request.number) for request in batch}
            ended_batches = self._open(_Batch(span, ended, images))
        self._end_spans(ended_batches)

    def recorded(self, outcomes: Sequence[Outcome]) -> None:
        """Remove these outcomes from their batches, and end the batches that have none left."""
        with self._lock:
            ended_batches = [
                batch
                for outcome in outcomes
                for image in [*self._batch_of.get(outcome.claim, ())]
                for batch in self._remove((outcome.claim, image))
            ]
        self._end_spans(ended_batches)

    def end(self) -> None:
        """End all open batches: the work is over."""
        with self._lock:
            ended_batches = list(self._batches.values())
            self._batches.clear()
            self._batch_of.clear()
        self._end_spans(ended_batches)

    def close(self, seconds: float, *, succeeded: bool) -> None:
        """See Traces.close."""
        self.end()
        if self._root is not None:
            self._tracer.end(self._root, time.monotonic(), failed=not succeeded)
        self._tracer.close(seconds)

    def device(self, stage: str, started: float) -> None:
        """See Traces.device."""
        self._span(stage, self._root, started, time.monotonic())

    def _open(self, batch: _Batch) -> list[_Batch]:
        """Add the batch; return the batches that this ends: those whose images it redraws, and the oldest."""
        ended_batches = [ended for key in batch.open_images for ended in self._remove(key)]
        if len(self._batches) >= _MAX_OPEN_BATCHES:
            oldest = next(iter(self._batches.values()))
            ended_batches += [ended for key in [*oldest.open_images] for ended in self._remove(key)]
        self._last_number += 1
        self._batches[self._last_number] = batch
        for claim, image in batch.open_images:
            self._batch_of.setdefault(claim, {})[image] = self._last_number
        return ended_batches

    def _remove(self, key: _ImageKey) -> list[_Batch]:
        """Remove the image from its batch; return the batch if this was its last image."""
        claim, image = key
        numbers = self._batch_of.get(claim, {})
        number = numbers.pop(image, 0)
        if not numbers:
            self._batch_of.pop(claim, None)
        batch = self._batches.get(number)
        if batch is None:
            return []
        batch.open_images.discard(key)
        return [] if batch.open_images else [self._batches.pop(number)]

    def _batch_numbers(self, subject: object) -> Iterable[int]:
        if isinstance(subject, Request):
            number = self._batch_of.get(subject.prompt.claim, {}).get(subject.number)
            return () if number is None else (number,)
        return self._batch_of.get(cast("Outcome", subject).claim, {}).values()

    def _end_spans(self, batches: Iterable[_Batch]) -> None:
        for batch in batches:
            for name, stage in batch.stages.items():
                self._span(name, batch.span, stage.began, stage.ended, seconds=stage.seconds)
            self._tracer.end(batch.span, batch.ended)

    def _span(
        self, stage: str, parent: Span | None, started: float, ended: float, *, seconds: float | None = None
    ) -> None:
        attributes = {**self._run, "text2img.stage.seconds": ended - started if seconds is None else seconds}
        self._tracer.end(self._tracer.begin(stage, started, parent, attributes), ended)


def _attributes(batch: Sequence[Request], results: Sequence[object] | None) -> dict[str, Any]:
    """Return the attributes of a batch's span; they hold no text from a prompt's owner."""
    shared = batch[0].parameters
    return {
        "text2img.batch.size": len(batch),
        "text2img.batch.failed": sum(isinstance(result, PromptFailed) for result in results or ()),
        "text2img.width": shared.width,
        "text2img.height": shared.height,
        "text2img.steps": shared.num_inference_steps,
    }
