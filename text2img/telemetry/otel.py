"""Spans by OpenTelemetry's SDK, sent where the standard OTEL variables say. Knows nothing of what they mean.

The provider is our own and not the process's: what the libraries beside us could tell is not ours to send.
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
    """Implements ``traced.Tracer`` by a provider."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("text2img", __version__)
        self._epoch = time.time_ns() - time.monotonic_ns()

    def begin(self, name: str, at: float, parent: Span | None, attributes: Mapping[str, Any]) -> Span:
        """See Tracer.begin."""
        context = None if parent is None else set_span_in_context(parent)
        return self._tracer.start_span(name, context, attributes=dict(attributes), start_time=self._time(at))

    def end(self, span: Span, at: float, *, failed: bool = False) -> None:
        """See Tracer.end."""
        if failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(self._time(at))

    def close(self, seconds: float) -> None:
        """See Tracer.close."""
        try:
            run_with_timeout(seconds, self._provider.shutdown)
        except Exception as exc:  # noqa: BLE001 - whatever a collector does, the run is about pictures
            log.warning("the last traces could not be sent: %s", exc)

    def _time(self, at: float) -> int:
        """Nanoseconds since 1970."""
        return self._epoch + round(at * 1e9)


class _LogOnceExporter(SpanExporter):
    """Another exporter, whose failures are said once: the library says each, with all of its tries."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._failed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send them."""
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS and not self._failed:
            log.warning("traces could not be sent; the run goes on without: check the OTEL variables")
        self._failed = result is not SpanExportResult.SUCCESS
        return result

    def shutdown(self) -> None:
        """End it, in the middle of a try if need be."""
        self._exporter.shutdown()


def tracer(names: Sequence[str], environment: Mapping[str, str]) -> SdkTracer | None:
    """What sends spans to the exporters of these names; None where there is none of them."""
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
    """The exporter that calls itself so; ``otlp`` is one for each protocol."""
    if name == "otlp":
        protocols = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
        chosen = next((environment[each] for each in protocols if environment.get(each)), "http/protobuf")
        name = "otlp_proto_grpc" if chosen == "grpc" else "otlp_proto_http"
    try:
        (found,) = entry_points(group=_GROUP, name=name)
        made: SpanExporter = found.load()()
    except Exception as exc:  # noqa: BLE001 - wrong variables must not cost the run
        log.warning(
            "there are no traces by %s: %s",
            name,
            "it is not installed" if isinstance(exc, ValueError) else exc,
        )
        return None
    return made


def _resource(environment: Mapping[str, str]) -> Resource:
    named = "OTEL_SERVICE_NAME" in environment or "service.name=" in environment.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    name = {} if named else {"service.name": "text2img"}
    return Resource.create({"service.version": __version__, **name})
