"""Prometheus metrics: a listener on a port of its own. Several processes of one machine may share one listener
through prometheus-client's multiprocess directory: set PROMETHEUS_MULTIPROC_DIR before any of them starts, and give
one of them the port."""

import os
import time
from collections.abc import Callable, Iterable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

from shared.errors import ConfigError

HOP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_hops = Histogram(
    "millrace_hop_seconds",
    "From an entry's being written to a stream to its being read by the next stage",
    ["stream"],
    buckets=HOP_SECONDS,
)


def serve(port: int) -> Callable[[], None]:
    """Answer GET /metrics on `port` from a thread; 0 does nothing. Returns what ends it again.

    Raises:
        ConfigError: the port cannot be listened on.
    """
    if port == 0:
        return lambda: None
    try:
        server, thread = start_http_server(port, registry=_registry())
    except OSError as error:
        raise ConfigError(f"MILLRACE_METRICS_PORT: cannot listen on {port}: {error.strerror}") from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


def _registry() -> CollectorRegistry:
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry


class Hop:
    """The way of entries through one stream, seen by who reads it. An entry's id says when Redis took it, so the clocks
    of Redis and of this machine must agree; nothing is less than 0."""

    def __init__(self, stream: str, clock: Callable[[], float] = time.time) -> None:
        """`stream` is the label: encode, generate, tokens or deltas."""
        self._seconds = _hops.labels(stream)
        self._clock = clock

    def read(self, entry_ids: Iterable[str]) -> None:
        """These entries have just been read for the first time."""
        now = self._clock()
        for entry_id in entry_ids:
            self._seconds.observe(max(0.0, now - int(entry_id.partition("-")[0]) / 1000))


def at_zero(metric: Counter, *labels: str) -> None:
    """Show a series for each value of its label from the start: a rate over what is not there is not 0."""
    for label in labels:
        metric.labels(label)


def value(metric: Counter | Gauge) -> float:
    """What this process has put into a metric, over all labels."""
    return _sum(metric, "_total" if isinstance(metric, Counter) else "")


def observed(histogram: Histogram) -> tuple[float, float]:
    """Sum and number of what this process has observed, over all labels."""
    return _sum(histogram, "_sum"), _sum(histogram, "_count")


def _sum(metric: Counter | Gauge | Histogram, suffix: str) -> float:
    return sum(
        sample.value for family in metric.collect() for sample in family.samples if sample.name == family.name + suffix
    )
