"""Prometheus metrics: a listener on a port of its own. Several processes of one machine may share one listener
through prometheus-client's multiprocess directory: set PROMETHEUS_MULTIPROC_DIR before any of them starts, and give
one of them the port."""

import os
from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

from shared.errors import ConfigError


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
