"""OpenTelemetry spans, exported as the standard OTEL variables configure.

The provider is not the global one of the process: spans of other libraries are not exported.
"""

from __future__ import annotations

import logging
import time
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Status, StatusCode, set_span_in_context

from text2img import __version__
from text2img.concurrency.timeouts import run_with_timeout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)

_GROUP: Final = "opentelemetry_traces_exporter"


class SdkTracer:
    """A maker of spans by an OpenTelemetry provider, with times of ``time.monotonic``; thread-safe."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("text2img", __version__)
        self._epoch = time.time_ns() - time.monotonic_ns()

    def begin(self, name: str, at: float, parent: Span | None, attributes: Mapping[str, Any]) -> Span:
        """Return a span that began at ``at``, under ``parent`` (None for a root)."""
        context = None if parent is None else set_span_in_context(parent)
        return self._tracer.start_span(name, context, attributes=dict(attributes), start_time=self._time(at))

    def end(self, span: Span, at: float, *, failed: bool = False) -> None:
        """End the span at ``at``."""
        if failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(self._time(at))

    def close(self, seconds: float) -> None:
        """Send the remaining spans within ``seconds``. Never raises."""
        try:
            run_with_timeout(seconds, self._provider.shutdown)
        except Exception as exc:  # noqa: BLE001 - a collector's failure must not fail the run
            log.warning("the last traces could not be sent: %s", exc)

    def _time(self, at: float) -> int:
        """Return nanoseconds since 1970."""
        return self._epoch + round(at * 1e9)


class _LogOnceExporter(SpanExporter):
    """Wrapper of an exporter that logs a failure once; the library would log every attempt."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._failed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send the spans; log the first of several failures in a row."""
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS and not self._failed:
            log.warning("traces could not be sent; the run continues without them: check the OTEL variables")
        self._failed = result is not SpanExportResult.SUCCESS
        return result

    def shutdown(self) -> None:
        """Shut the exporter down, even during an attempt."""
        self._exporter.shutdown()


def tracer(names: Sequence[str], environment: Mapping[str, str]) -> SdkTracer | None:
    """Return a tracer for the exporters of these names; None if none of them is available."""
    if not log.isEnabledFor(logging.DEBUG):
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    exporters = [exporter for name in names if (exporter := _exporter(name, environment)) is not None]
    if not exporters:
        return None
    provider = TracerProvider(resource=_resource(environment), shutdown_on_exit=False)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(_LogOnceExporter(exporter)))
    return SdkTracer(provider)


def _exporter(name: str, environment: Mapping[str, str]) -> SpanExporter | None:
    """Return the exporter of this name, None if it is unavailable; ``otlp`` has one for each protocol."""
    if name == "otlp":
        protocols = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
        protocol = next(
            (environment[variable] for variable in protocols if environment.get(variable)), "http/protobuf"
        )
        name = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
    try:
        (entry_point,) = entry_points(group=_GROUP, name=name)
        exporter: SpanExporter = entry_point.load()()
    except Exception as exc:  # noqa: BLE001 - wrong variables must not fail the run
        log.warning(
            "no traces by %s: %s",
            name,
            "the exporter is not installed" if isinstance(exc, ValueError) else exc,
        )
        return None
    return exporter


def _resource(environment: Mapping[str, str]) -> Resource:
    has_name = "OTEL_SERVICE_NAME" in environment or "service.name=" in environment.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    name = {} if has_name else {"service.name": "text2img"}
    return Resource.create({"service.version": __version__, **name})
