"""OpenTelemetry collector for tests: OTLP over HTTP on loopback, decoded by the protocol's own messages."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from machine import PATIENCE_S
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from server_thread import served

from shared.config import CommonSettings
from shared.tracing import Tracing, start


@dataclass(frozen=True)
class Event:
    name: str
    at: int  # nanoseconds


@dataclass(frozen=True)
class Received:
    """Span that was received."""

    service: str
    resource: dict[str, Any]
    name: str
    kind: int
    trace: str
    id: str
    parent: str  # empty: it has none
    start: int  # nanoseconds
    end: int
    attributes: dict[str, Any]
    events: tuple[Event, ...]
    links: tuple[str, ...]  # ids of spans
    failed: bool


class Collector:
    """Store of the spans received so far."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self._spans: list[Received] = []
        self._changed = threading.Condition()

    def receive(self, path: str, headers: dict[str, str], body: bytes) -> int:
        """Store the spans of one export, and return the status to answer with."""
        if path != "/v1/traces" or headers["content-type"] != "application/x-protobuf":
            return 404
        with self._changed:
            self.bodies.append(body)
            self.headers.append(headers)
            self._spans += _spans(body)
            self._changed.notify_all()
        return 200

    def spans(self) -> list[Received]:
        """Return the spans received so far, in the order of their starts."""
        return sorted(self._spans, key=lambda s: s.start)

    def wait(self, enough: Callable[[list[Received]], bool], trace: str = "") -> list[Received]:
        """Wait until `enough`, and return the spans of a trace (or all), in the order of their starts."""

        def spans() -> list[Received]:
            return [span for span in self.spans() if trace in ("", span.trace)]

        with self._changed:
            complete = self._changed.wait_for(lambda: enough(spans()), PATIENCE_S)
            assert complete, f"only {[(s.service, s.name) for s in spans()]}"
            return spans()


@contextmanager
def collector() -> Iterator[Collector]:
    """Run a collector while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = got.receive(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Tests print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    got = Collector(server.server_address[1])
    with served(server):
        yield got


@contextmanager
def traced(service: str) -> Iterator[tuple[Tracing, Collector]]:
    """Trace this process into a collector; all spans are sent when the block ends."""
    with collector() as got:
        tracing = start(service, CommonSettings(redis_url="", model="", name="test", otlp_endpoint=got.url))
        try:
            yield tracing, got
        finally:
            tracing.close()


@contextmanager
def silent_collector() -> Iterator[str]:
    """Yield the URL of a collector that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def _spans(body: bytes) -> Iterator[Received]:
    for each in ExportTraceServiceRequest.FromString(body).resource_spans:
        resource = _attributes(each.resource.attributes)
        for scope in each.scope_spans:
            for span in scope.spans:
                yield Received(
                    resource["service.name"],
                    resource,
                    span.name,
                    span.kind,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    _attributes(span.attributes),
                    tuple(Event(event.name, event.time_unix_nano) for event in span.events),
                    tuple(link.span_id.hex() for link in span.links),
                    span.status.code == span.status.STATUS_CODE_ERROR,
                )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)
