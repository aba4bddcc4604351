"""Whether a run is traced: what the standard OTEL variables ask for, and what a job hangs its parts on.

Imports nothing for it unless they ask. Knows neither what is traced nor how it is sent.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, cast
from urllib.parse import unquote

from text2img.errors import PromptFailed
from text2img.prompts import Claim, Request
from text2img.telemetry.progress import MultiProgress, NullProgress

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from text2img.prompts import Outcome
    from text2img.telemetry.progress import Progress


log = logging.getLogger(__name__)

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_HEADERS: Final = ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS")


class Traces(Protocol):
    """What a job hangs its parts on, so that they are seen."""

    def device(self, stage: str, started: float) -> None:
        """The device was busy with ``stage`` since ``started`` (``time.monotonic``), for no batch."""
        ...

    def generated(
        self,
        batch: Sequence[Request],
        results: Sequence[object] | None,
        spent: Mapping[str, float],
        started: float,
    ) -> None:
        """The device has worked on a batch since ``started``, ``spent`` seconds on each stage in turn.

        ``results``: an image or a PromptFailed for each request; None where the device failed.
        """
        ...

    def wrap_progress(self, progress: Progress) -> Progress:
        """The same progress, from which it is known what is settled."""
        ...

    def stage(self, stage: str, of: Sequence[object], started: float, ended: float) -> None:
        """A stage took this time (``time.monotonic``), for these requests or outcomes, where it is known."""
        ...

    def close(self, seconds: float, *, succeeded: bool) -> None:
        """The run is over: send what is left, within so many seconds. Never raises."""
        ...


class NoopTraces:
    """Nobody asked for traces."""

    def device(self, stage: str, started: float) -> None:
        """Nothing."""

    def generated(
        self,
        batch: Sequence[Request],
        results: Sequence[object] | None,
        spent: Mapping[str, float],
        started: float,
    ) -> None:
        """Nothing."""

    def wrap_progress(self, progress: Progress) -> Progress:
        """The progress itself."""
        return progress

    def stage(self, stage: str, of: Sequence[object], started: float, ended: float) -> None:
        """Nothing."""

    def close(self, seconds: float, *, succeeded: bool) -> None:
        """Nothing."""


def traces(environment: Mapping[str, str], run_id: str, *, endless: bool) -> Traces:
    """What the standard OTEL variables ask for. The spans of an ``endless`` run stand under no common one."""
    names = _exporters(environment)
    if not names:
        return NoopTraces()
    try:
        from text2img.telemetry.otel import tracer
    except ModuleNotFoundError:
        log.info(
            "the OTEL variables ask for traces, which need OpenTelemetry; "
            "pip install 'opentelemetry-sdk>=1.35' 'opentelemetry-exporter-otlp-proto-http>=1.35'"
        )
        return NoopTraces()
    made = tracer(names, environment)
    return NoopTraces() if made is None else TraceRecorder(made, run_id, endless=endless)


def secrets(environment: Mapping[str, str]) -> Iterator[str]:
    """What of the OTEL variables is not to be shown: headers' values, and URLs with a password or a query."""
    yield from (url for name in _ENDPOINTS if {"@", "?"} & set(url := environment.get(name, "")))
    for name in _HEADERS:
        for header in environment.get(name, "").split(","):
            value = header.partition("=")[2].strip()
            yield from {value, unquote(value), unquote(value).rpartition(" ")[2]} - {""}


def _exporters(environment: Mapping[str, str]) -> list[str]:
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    named = environment.get("OTEL_TRACES_EXPORTER", "")
    if not named and any(environment.get(name) for name in _ENDPOINTS):
        named = "otlp"
    return [name for each in named.split(",") if (name := each.strip()) not in {"", "none"}]


_OPEN: Final = 32  # batches whose end is waited for; of one whose claims were lost it never comes

_BRIEF: Final = 0.001  # seconds; what an engine's stage takes less than has no span

_Key = tuple[Claim, int]
"""One picture: its claim, and its number among the prompt's."""


class Tracer(Protocol):
    """Makes spans; moments are those of ``time.monotonic``. Safe to use from several threads."""

    def begin(self, name: str, at: float, parent: Any, attributes: Mapping[str, Any]) -> Any:
        """A span that has begun then, under that one, or under none."""
        ...

    def end(self, span: Any, at: float, *, failed: bool = False) -> None:
        """It has ended then."""
        ...

    def close(self, seconds: float) -> None:
        """Send what is left, within so many seconds. Never raises."""
        ...


@dataclass(slots=True)
class _Stage:
    """One stage of one batch, which several threads may share: from the first start to the last end."""

    began: float
    ended: float
    seconds: float = 0.0


@dataclass(slots=True)
class _Batch:
    """A batch whose outcomes are not all recorded: ``left`` are its requests by claim and number."""

    span: Any
    ended: float
    left: set[_Key]
    stages: dict[str, _Stage] = field(default_factory=dict)

    def add(self, stage: str, started: float, ended: float) -> None:
        known = self.stages.setdefault(stage, _Stage(started, ended))
        known.began, known.ended = min(known.began, started), max(known.ended, ended)
        known.seconds += ended - started
        self.ended = max(self.ended, ended)


class TraceRecorder(NullProgress):
    """Traces one run by a ``tracer``. A batch's span ends when its last outcome is recorded."""

    def __init__(self, tracer: Tracer, run_id: str, *, endless: bool) -> None:
        self._tracer, self._run = tracer, {"text2img.run.id": run_id}
        self._root = None if endless else tracer.begin("run", time.monotonic(), None, self._run)
        self._lock = threading.Lock()
        self._batches: dict[int, _Batch] = {}
        self._made = 0
        self._of: dict[Claim, dict[int, int]] = {}  # which batch a claim's pictures are of, by their number

    def wrap_progress(self, progress: Progress) -> Progress:
        """See Traces.following."""
        return MultiProgress(progress, self)

    def stage(self, stage: str, of: Sequence[object], started: float, ended: float) -> None:
        """See Traces.stage. What is of a batch that is open is added up there, all else has its own span."""
        with self._lock:
            batches = {number for each in of for number in self._numbers(each)} & self._batches.keys()
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
        span = self._tracer.begin("batch", started, self._root, {**self._run, **_described(batch, results)})
        for stage, seconds in spent.items():
            if seconds < _BRIEF:
                continue
            over_at = min(ended, started + seconds)
            self._span(stage, span, started, over_at)
            started = over_at
        if results is None:
            self._tracer.end(span, ended, failed=True)
            return
        with self._lock:
            over = self._opened(_Batch(span, ended, {(each.prompt.claim, each.number) for each in batch}))
        self._close_all(over)

    def settled(self, outcomes: Sequence[Outcome]) -> None:
        """These outcomes are recorded: whatever batch has none left is over."""
        with self._lock:
            over = [
                batch
                for outcome in outcomes
                for image in [*self._of.get(outcome.claim, ())]
                for batch in self._leave((outcome.claim, image))
            ]
        self._close_all(over)

    def end(self) -> None:
        """The work is over: so are all batches."""
        with self._lock:
            over = list(self._batches.values())
            self._batches.clear()
            self._of.clear()
        self._close_all(over)

    def close(self, seconds: float, *, succeeded: bool) -> None:
        """See Traces.close."""
        self.end()
        if self._root is not None:
            self._tracer.end(self._root, time.monotonic(), failed=not succeeded)
        self._tracer.close(seconds)

    def device(self, stage: str, started: float) -> None:
        """See Traces.device."""
        self._span(stage, self._root, started, time.monotonic())

    def _opened(self, batch: _Batch) -> list[_Batch]:
        """The batches that are over with this one: those whose pictures it draws anew, and the oldest."""
        over = [gone for key in batch.left for gone in self._leave(key)]
        if len(self._batches) >= _OPEN:
            oldest = next(iter(self._batches.values()))
            over += [gone for key in [*oldest.left] for gone in self._leave(key)]
        self._made += 1
        self._batches[self._made] = batch
        for claim, image in batch.left:
            self._of.setdefault(claim, {})[image] = self._made
        return over

    def _leave(self, key: _Key) -> list[_Batch]:
        """The picture is of its batch no more; the batch, where it was the last."""
        claim, image = key
        pictures = self._of.get(claim, {})
        number = pictures.pop(image, 0)
        if not pictures:
            self._of.pop(claim, None)
        batch = self._batches.get(number)
        if batch is None:
            return []
        batch.left.discard(key)
        return [] if batch.left else [self._batches.pop(number)]

    def _numbers(self, of: object) -> Iterable[int]:
        if isinstance(of, Request):
            number = self._of.get(of.prompt.claim, {}).get(of.number)
            return () if number is None else (number,)
        return self._of.get(cast("Outcome", of).claim, {}).values()

    def _close_all(self, batches: Iterable[_Batch]) -> None:
        for batch in batches:
            for name, stage in batch.stages.items():
                self._span(name, batch.span, stage.began, stage.ended, seconds=stage.seconds)
            self._tracer.end(batch.span, batch.ended)

    def _span(
        self, stage: str, parent: Any, started: float, ended: float, *, seconds: float | None = None
    ) -> None:
        attributes = {**self._run, "text2img.stage.seconds": ended - started if seconds is None else seconds}
        self._tracer.end(self._tracer.begin(stage, started, parent, attributes), ended)


def _described(batch: Sequence[Request], results: Sequence[object] | None) -> dict[str, Any]:
    """What all of a batch share; nothing that an owner wrote."""
    shared = batch[0].parameters
    return {
        "text2img.batch.size": len(batch),
        "text2img.batch.failed": sum(isinstance(each, PromptFailed) for each in results or ()),
        "text2img.width": shared.width,
        "text2img.height": shared.height,
        "text2img.steps": shared.num_inference_steps,
    }
