"""Prometheus metrics, served on a port of their own.

Several processes of one machine may share a listener through prometheus-client's multiprocess directory: set
PROMETHEUS_MULTIPROC_DIR before any of them starts, and give one of them, or whoever starts them, the port.
"""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

from shared import metric_files
from shared.errors import ConfigError

metric_files.install()

HOP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

HOP = {"hop_s": ("hop_seconds", "hops")}  # mean latency of the entries that a replica reads: see Growth.ratios

_hops = Histogram(
    "millrace_hop_seconds",
    "Time from the write of an entry to a stream until the next stage reads it",
    ["stream"],
    buckets=HOP_SECONDS,
)


def serve(port: int, host: str = "0.0.0.0", directory: Path | None = None) -> Callable[[], None]:
    """Serve GET /metrics on `port` of `host` from a thread; do nothing for 0. Returns a function that stops it.

    Args:
        directory: of the processes whose metrics these are (unset: as PROMETHEUS_MULTIPROC_DIR, else our own alone).

    Raises:
        ConfigError: the port cannot be listened on.
    """
    if port == 0:
        return lambda: None
    try:
        server, thread = start_http_server(port, host, registry=_registry(directory))
    except OSError as error:
        raise ConfigError(f"MILLRACE_METRICS_PORT: cannot listen on {host}:{port}: {error.strerror}") from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


def _registry(directory: Path | None) -> CollectorRegistry:
    if directory is None and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry, directory and str(directory))  # type: ignore[no-untyped-call]
    return registry


class Hop:
    """Latency of the entries of one stream, observed by their reader.

    An entry's id has the time of its write by Redis's clock, which must agree with this machine's; a negative latency
    counts as 0.
    """

    def __init__(self, stream: str, clock: Callable[[], float] = time.time) -> None:
        """`stream` is the label: encode, generate, tokens or deltas."""
        self._seconds = _hops.labels(stream)
        self._clock = clock

    def read(self, entry_ids: Iterable[str]) -> None:
        """Observe entries that have just been read for the first time."""
        now = self._clock()
        for entry_id in entry_ids:
            self._seconds.observe(max(0.0, now - int(entry_id.partition("-")[0]) / 1000))


def hop_totals() -> dict[str, float]:
    """Return the sum and the number of the latencies that this process observed, for the ratio `HOP`."""
    seconds, entries = observed(_hops)
    return {"hop_seconds": seconds, "hops": entries}


def at_zero(metric: Counter, *labels: str) -> None:
    """Create the series of each label value at 0, so that a rate over it is 0 and not absent."""
    for label in labels:
        metric.labels(label)


def value(metric: Counter | Gauge) -> float:
    """Return the value of a metric in this process, summed over all labels."""
    return _sum(metric, "_total" if isinstance(metric, Counter) else "")


def observed(histogram: Histogram) -> tuple[float, float]:
    """Return sum and count of the observations of this process, over all labels."""
    return _sum(histogram, "_sum"), _sum(histogram, "_count")


def _sum(metric: Counter | Gauge | Histogram, suffix: str) -> float:
    return sum(
        sample.value for family in metric.collect() for sample in family.samples if sample.name == family.name + suffix
    )
