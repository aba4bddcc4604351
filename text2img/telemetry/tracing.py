"""Whether a run is traced: what the standard OTEL variables ask for, and what a job hangs its parts on.

Imports nothing for it unless they ask. Knows neither what is traced nor how it is sent.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from text2img.prompts import Request
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

    def following(self, progress: Progress) -> Progress:
        """The same progress, from which it is known what is settled."""
        ...

    def stage(self, stage: str, of: Sequence[object], started: float, ended: float) -> None:
        """A stage took this time (``time.monotonic``), for these requests or outcomes, where it is known."""
        ...

    def close(self, seconds: float, *, succeeded: bool) -> None:
        """The run is over: send what is left, within so many seconds. Never raises."""
        ...


class Untraced:
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

    def following(self, progress: Progress) -> Progress:
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
        return Untraced()
    try:
        from text2img.telemetry.otel import tracer
        from text2img.telemetry.trace_recorder import Traced
    except ModuleNotFoundError:
        log.info(
            "the OTEL variables ask for traces, which need OpenTelemetry; "
            "pip install 'opentelemetry-sdk>=1.35' 'opentelemetry-exporter-otlp-proto-http>=1.35'"
        )
        return Untraced()
    made = tracer(names, environment)
    return Untraced() if made is None else Traced(made, run_id, endless=endless)


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
