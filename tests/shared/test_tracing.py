import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from collector import Collector, collector, silent_collector
from machine import PATIENCE_S

from shared import tracing
from shared.config import CommonSettings, load
from shared.errors import ConfigError
from shared.tracing import OFF, Tracing

CALLER_TRACE, CALLER_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLER = f"00-{CALLER_TRACE}-{CALLER_SPAN}-01"
UNSAMPLED = f"00-{CALLER_TRACE}-{CALLER_SPAN}-00"
SERVER, INTERNAL = 2, 1


def start(url: str, ratio: float = 1.0) -> Tracing:
    settings = CommonSettings(redis_url="", model="", name="pod-1", otlp_endpoint=url, trace_ratio=ratio)
    return tracing.start("engine", settings)


def at_least(count: int) -> Callable[[list[object]], bool]:
    return lambda spans: len(spans) >= count


def test_a_recorded_span_is_what_was_said_of_it() -> None:
    with collector() as got:
        traces = start(f"{got.url}/")
        traces.record("decode", CALLER, 1700000000.25, 1700000001.5, {"n": 3, "why": ["stop"]}, "timeout")
        traces.close()
        [span] = got.wait(at_least(1))
    assert (span.name, span.trace, span.parent, span.kind) == ("decode", CALLER_TRACE, CALLER_SPAN, INTERNAL)
    assert (span.start, span.end) == (1700000000_250000000, 1700000001_500000000)
    assert span.attributes == {"n": 3, "why": ["stop"], "error.type": "timeout"}
    assert span.failed
    assert span.resource["service.name"] == "millrace-engine"
    assert span.resource["service.instance.id"] == "pod-1"
    assert span.resource["service.version"]


def test_a_server_span_goes_on_with_its_callers_trace() -> None:
    with collector() as got:
        traces = start(got.url, ratio=0.0)  # the caller has decided
        span = traces.serve("POST /", CALLER, {"a": "b"})
        assert span is not None
        span.event("first", 1700000000.0)
        span.set({"c": 1.5})
        span.fail("503")
        span.fail("500")  # only the first counts
        assert traces.follows(span.traceparent)
        traces.record("child", span.traceparent, 1.0, 2.0, {})
        span.end()
        traces.close()
        child, server = got.wait(at_least(2), CALLER_TRACE)
    assert (server.parent, server.kind, child.parent) == (CALLER_SPAN, SERVER, server.id)
    assert server.attributes == {"a": "b", "c": 1.5, "error.type": "503"}
    assert [(event.name, event.at) for event in server.events] == [("first", 1700000000_000000000)]
    assert span.trace_id == CALLER_TRACE
    assert span.traceparent == f"00-{CALLER_TRACE}-{server.id}-01"


@pytest.mark.parametrize("caller", [None, "", "nonsense", f"00-{'0' * 32}-{CALLER_SPAN}-01", f"ff{CALLER[2:]}"])
def test_without_a_caller_a_trace_begins(caller: str | None) -> None:
    with collector() as got:
        traces = start(got.url)
        span = traces.serve("POST /", caller, {})
        assert span is not None
        span.end()
        traces.close()
        [server] = got.wait(at_least(1))
    assert (server.parent, server.trace) == ("", span.trace_id)
    assert server.trace not in ("0" * 32, CALLER_TRACE)


@pytest.mark.parametrize(("caller", "ratio"), [(None, 0.0), (UNSAMPLED, 1.0)])
def test_a_trace_that_is_not_recorded_says_so_to_the_next_stage(caller: str | None, ratio: float) -> None:
    with collector() as got:
        traces = start(got.url, ratio)
        span = traces.serve("POST /", caller, {})
        assert span is not None
        span.set({"a": 1})
        span.end()
        assert int(span.traceparent.rpartition("-")[2], 16) & 1 == 0
        assert not traces.follows(span.traceparent)
        traces.close()
    assert got.bodies == []


def test_off() -> None:
    assert tracing.start("engine", CommonSettings(redis_url="", model="")) is OFF
    assert OFF.serve("POST /", CALLER, {}) is None
    assert not OFF.follows(CALLER)
    OFF.close()


def test_a_span_never_ends_before_it_starts() -> None:
    """Clocks of two machines differ."""
    with collector() as got:
        traces = start(got.url)
        traces.record("queue", CALLER, 2.0, 1.0, {})
        traces.close()
        [span] = got.wait(at_least(1))
    assert span.start == span.end == 1_000000000


def test_the_sdks_own_variables_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test,service.name=other")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20token")
    with collector() as got:
        traces = start(got.url)
        traces.record("queue", CALLER, 1.0, 2.0, {})
        traces.close()
        [span] = got.wait(at_least(1))
    assert span.resource["deployment.environment.name"] == "test"
    assert span.resource["service.name"] == "millrace-engine"
    assert got.headers[0]["authorization"] == "Bearer token"


def test_a_silent_collector_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue is bounded, and so is the wait at the end, however long the SDK's own would be."""
    monkeypatch.setattr(tracing, "FLUSH_S", 0.1)
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    with silent_collector() as url:
        traces, released = start(url), threading.Event()
        monkeypatch.setattr(traces._provider, "shutdown", released.wait)

        def use() -> None:
            for _ in range(100):
                traces.record("queue", CALLER, 1.0, 2.0, {})
            traces.close()

        using = threading.Thread(target=use, daemon=True)
        using.start()
        using.join(PATIENCE_S)
        held_up = using.is_alive()
        released.set()
    assert not held_up


@pytest.mark.parametrize(
    "url", ["collector:4318", "grpc://c:4317", "http://", "http://user:password@c:4318", "http:///"]
)
def test_an_endpoint_that_cannot_be_is_refused(url: str) -> None:
    variables = {"MILLRACE_REDIS_URL": "", "MILLRACE_MODEL": "", "MILLRACE_OTLP_ENDPOINT": url}
    with pytest.raises(ConfigError, match="MILLRACE_OTLP_ENDPOINT"):
        load(CommonSettings, variables)


@pytest.mark.parametrize("service", ["gateway", "postproc"])
def test_a_service_without_traces_loads_no_exporter(service: str) -> None:
    """The SDK is loaded by redis-py wherever it is installed, and the API by FastAPI; neither does anything then."""
    script = f"""import sys, services.{service}.__main__
from shared import config, tracing
tracing.start("x", config.CommonSettings(redis_url="", model=""))
print([name for name in sys.modules if name.startswith(("opentelemetry.exporter", "google.protobuf", "requests"))])"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_collector_of_the_tests_refuses_what_is_no_trace() -> None:
    assert Collector(1).take("/", {"content-type": "application/x-protobuf"}, b"") == 404
