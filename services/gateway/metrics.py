"""Prometheus metrics of the gateway, with the prefix `millrace_`."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared.metrics import HOP, at_zero, hop_totals, observed, value
from shared.rates import Recent

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30)


class GatewayMetrics:
    """Metrics of one process, registered in `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "millrace_http_requests", "HTTP requests answered", ("method", "path", "status"), registry=registry
        )
        self.duration = Histogram(
            "millrace_http_request_duration_seconds",
            "From the first byte of a request to the last of its answer",
            ("method", "path"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "millrace_time_to_first_token_seconds",
            "From a chat request's arrival to its first token",
            buckets=_FIRST_TOKEN,
            registry=registry,
        )
        self.latency = Histogram(
            "millrace_e2e_request_latency_seconds",
            "From a chat request's arrival to its last token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.prompt_lengths = Histogram(
            "millrace_request_prompt_tokens", "Prompt tokens of one request", buckets=_TOKENS, registry=registry
        )
        self.answer_lengths = Histogram(
            "millrace_request_generation_tokens", "Generated tokens of one choice", buckets=_TOKENS, registry=registry
        )
        self.success = Counter(
            "millrace_request_success", "Choices answered, by how they ended", ("finished_reason",), registry=registry
        )
        at_zero(self.success, "stop", "length", "tool_calls")
        self.ended = Counter(
            "millrace_requests_ended",
            "Requests to the APIs that ended, refused ones included, by how",
            ("model", "endpoint", "outcome"),
            registry=registry,
        )
        self.rejections = Counter(
            "millrace_admission_rejections",
            "Requests refused: too many here, too many bytes of them, too many in the pipeline, too late, draining",
            ("reason",),
            registry=registry,
        )
        at_zero(
            self.rejections, "max_concurrency", "max_queue", "max_bodies_bytes", "upload_budget", "deadline", "draining"
        )
        self.body_bytes = Gauge(
            "millrace_request_body_bytes",
            "Bytes of chat requests that are being read, decoded or stored",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.connections = Gauge(
            "millrace_connections", "Open HTTP connections", registry=registry, multiprocess_mode="livesum"
        )
        self.connections_closed = Counter(
            "millrace_connections_closed",
            "Connections that were closed: overdue, not HTTP, or to make room; or refused for want of room",
            ("reason",),
            registry=registry,
        )
        at_zero(self.connections_closed, "timeout", "invalid", "evicted", "refused")
        self.open = Gauge(
            "millrace_open_requests",
            "Chat requests being answered",
            ("stream",),
            registry=registry,
            multiprocess_mode="livesum",
        )
        for form in ("true", "false"):  # made in its file now, and not while the first request waits
            self.open.labels(form)
        self.prompt_tokens = Counter(
            "millrace_answered_prompt_tokens", "Prompt tokens of finished requests", registry=registry
        )
        self.generation_tokens = Counter(
            "millrace_answered_tokens", "Generated tokens of finished requests", registry=registry
        )
        self.cancelled = Counter(
            "millrace_requests_cancelled", "Choices cancelled before they ended", registry=registry
        )
        self.batch_lines = Counter(
            "millrace_batch_lines", "Lines of batches that have a result, by which", ("outcome",), registry=registry
        )
        at_zero(self.batch_lines, "completed", "failed", "expired")
        self.batches = Gauge("millrace_batches", "Batches worked on", registry=registry, multiprocess_mode="livesum")
        self._recent = Recent()

    def load(self) -> dict[str, float]:
        """Return the recent rates for the lease's status."""
        first_seconds, firsts = observed(self.first_token)
        latencies, answered = observed(self.latency)
        totals = {
            "answered": answered,
            "latencies": latencies,
            "firsts": firsts,
            "first_seconds": first_seconds,
            "tokens": value(self.generation_tokens),
            "cancelled": value(self.cancelled),
            **hop_totals(),
        }
        recent = self._recent.growth(totals)
        return {
            "answered_per_s": recent.per_second("answered"),
            "answered_tokens_per_s": recent.per_second("tokens"),
            "cancelled_per_s": recent.per_second("cancelled"),
            **recent.ratios(
                {"first_token_s": ("first_seconds", "firsts"), "latency_s": ("latencies", "answered"), **HOP}
            ),
        }
