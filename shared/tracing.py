"""Traces: spans of each stage's work on a request, for an OpenTelemetry collector.

Off unless `otlp_endpoint` is set: no exporter is imported then, and a request costs one comparison.

The gateway begins a span, as the child of its caller's if a W3C traceparent came with the request; that span's own
traceparent travels in `Request.trace`, and the other stages record their spans as its children, each when its part is
over. Sampling is decided where the trace begins and travels in the traceparent. Spans hold times, counts and names, and
never the content of a request or an answer.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

from shared.config import CommonSettings
from shared.version import MILLRACE_VERSION

if TYPE_CHECKING:
    from opentelemetry import trace as otel
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

FLUSH_S = 2.0  # for the spans left at the end; those that the collector has not received by then are lost
REQUEST_ID = "millrace.request_id"  # as in the logs; with n > 1 each choice has its own
ERROR_TYPE = "error.type"

Attributes = Mapping[str, str | bool | int | float | Sequence[str]]


class Span:
    """Span under way. Times are unix seconds."""

    __slots__ = ("_failed", "_span", "trace_id", "traceparent")

    def __init__(self, span: "otel.Span") -> None:
        from opentelemetry.trace import format_trace_id

        context = span.get_span_context()
        self._span = span
        self._failed = False
        self.trace_id = format_trace_id(context.trace_id)
        self.traceparent = f"00-{self.trace_id}-{context.span_id:016x}-{context.trace_flags:02x}"

    def set(self, attributes: Attributes) -> None:
        """Add or replace attributes."""
        self._span.set_attributes(attributes)

    def link(self, trace: str) -> None:
        """Point to the span of another trace, by its traceparent."""
        self._span.add_link(_span_context(trace))

    def event(self, name: str, at: float) -> None:
        """Add an event."""
        self._span.add_event(name, timestamp=_nanoseconds(at))

    def fail(self, kind: str) -> None:
        """Mark the span as failed; only the first call counts."""
        if not self._failed:
            self._failed = True
            _fail(self._span, kind)

    def end(self) -> None:
        """End the span and queue it for export."""
        self._span.end()


class Tracing:
    """Factory of spans, which are exported in the background. `OFF` makes none."""

    def __init__(self, provider: "TracerProvider | None") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("millrace", MILLRACE_VERSION) if provider else None

    def serve(self, name: str, caller: str | None, attributes: Attributes) -> Span | None:
        """Begin the span of a request from outside, in the trace of `caller` (a traceparent) or in a new one."""
        if self._tracer is None:
            return None
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(name, _context(caller), SpanKind.SERVER, attributes)
        return Span(span) if span.get_span_context().is_valid else None

    def work(self, name: str, attributes: Attributes) -> Span | None:
        """Begin the span of work that no caller waits for, in a new trace."""
        if self._tracer is None:
            return None
        span = self._tracer.start_span(name, _context(None), attributes=attributes)
        return Span(span) if span.get_span_context().is_valid else None

    def follows(self, trace: str | None) -> TypeGuard[str]:
        """Return True if spans of the trace that a traceparent names are recorded."""
        return self._tracer is not None and trace is not None and bool(int(trace[-2:], 16) & 1)

    def record(
        self, name: str, trace: str, start: float, end: float, attributes: Attributes, error: str | None = None
    ) -> None:
        """Record a span that is over, as a child of the one in `trace`, a traceparent for which `follows` is true.

        Times are unix seconds; `error` is the kind of failure.
        """
        assert self._tracer is not None
        span = self._tracer.start_span(
            name, _context(trace), attributes=attributes, start_time=_nanoseconds(min(start, end))
        )
        if error is not None:
            _fail(span, error)
        span.end(_nanoseconds(end))

    def close(self) -> None:
        """Export the spans left, for FLUSH_S at most."""
        if self._provider is not None:
            # The SDK's own limit is half a minute. A daemon: a collector that is silent must not keep the process.
            closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
            closing.start()
            closing.join(FLUSH_S)


OFF = Tracing(None)


def start(service: str, settings: CommonSettings) -> Tracing:
    """Return the Tracing that the settings configure.

    The SDK's own variables (OTEL_RESOURCE_ATTRIBUTES, OTEL_EXPORTER_OTLP_HEADERS, OTEL_BSP_MAX_QUEUE_SIZE, ...) apply,
    too. A full queue drops spans; nothing waits for it.
    """
    if not settings.otlp_endpoint:
        return OFF
    # Imported here, since a process without traces needs none of it.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    who = {
        "service.name": f"millrace-{service}",
        "service.instance.id": settings.name,
        "service.version": MILLRACE_VERSION,
    }
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(settings.trace_ratio)),
        resource=Resource.create(who),
        shutdown_on_exit=False,  # `close` does it, and in time
    )
    exporter = OTLPSpanExporter(f"{settings.otlp_endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


def _context(traceparent: str | None) -> "Context":
    """Return the context of a traceparent, never the ambient one; without one, or with zeros, one without a parent."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent or ""}, Context())


def _span_context(traceparent: str) -> "otel.SpanContext":
    from opentelemetry.trace import get_current_span

    return get_current_span(_context(traceparent)).get_span_context()


def _fail(span: "otel.Span", kind: str) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute(ERROR_TYPE, kind)
    span.set_status(StatusCode.ERROR)


def _nanoseconds(seconds: float) -> int:
    """Convert seconds without the rounding error of a product with 1e9."""
    return int(seconds) * 10**9 + round(seconds % 1 * 1e9)
