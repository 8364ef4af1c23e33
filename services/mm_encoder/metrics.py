"""Metrics of the mm_encoder."""

from contextlib import AbstractContextManager
from typing import Literal, get_args

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from shared.messages import MediaKind
from shared.metrics import HOP, at_zero, hop_totals, observed, value
from shared.rates import Recent

Stage = Literal["fetch", "plan", "decode", "tower", "store"]
DecoderEnd = Literal["time", "crash"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters, gauges and histograms of one process, in its registry."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._media = Counter(
            "millrace_mm_cache_queries",
            "Media of requests that passed all checks, each looked up in the cache",
            ["kind"],
            registry=registry,
        )
        self._hits = Counter(
            "millrace_mm_cache_hits", "Media whose embeddings were there already", ["kind"], registry=registry
        )
        for counter in (self._media, self._hits):
            at_zero(counter, *get_args(MediaKind))
        self._bytes = Counter("millrace_mm_fetched_bytes", "Bytes of media fetched by URL", registry=registry)
        self._requests = Counter(
            "millrace_mm_requests", "Requests that left this stage, by outcome", ["outcome"], registry=registry
        )
        self._ends = Counter(
            "millrace_mm_decoder_ends",
            "Files that ended their decoder processes, by reason: over its time, or crashed",
            ["reason"],
            registry=registry,
        )
        at_zero(self._ends, *get_args(DecoderEnd))
        self._pieces = Counter(
            "millrace_mm_pieces", "Pieces of passes, of a GPU that an engine uses, too", registry=registry
        )
        self._piece_waits = Counter(
            "millrace_mm_piece_wait_seconds", "Seconds that pieces waited for steps of the engine", registry=registry
        )
        self._seconds = Histogram(
            "millrace_mm_stage_seconds",
            "Seconds of one step of one image or video",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.running = Gauge(
            "millrace_mm_running", "Requests in flight", multiprocess_mode="livesum", registry=registry
        )
        self.step_age = Gauge(
            "millrace_mm_step_age_seconds",
            "Age of the batch in the vision tower, seen from beside; 0: none",
            multiprocess_mode="livemax",
            registry=registry,
        )
        self._recent = Recent()

    def stage(self, stage: Stage) -> AbstractContextManager[object]:
        """Return a context manager that observes the time spent inside."""
        return self._seconds.labels(stage).time()

    def count_fetched(self, size: int) -> None:
        """Count the bytes of one download."""
        self._bytes.inc(size)

    def count_piece(self, waited_s: float) -> None:
        """Count a piece of a pass, and how long the next one waited."""
        self._pieces.inc()
        self._piece_waits.inc(waited_s)

    def count_decoder_end(self, reason: DecoderEnd) -> None:
        """Count a file over its time, or one that makes its decoder crash."""
        self._ends.labels(reason).inc()

    def count_media(self, kind: MediaKind, hit: bool) -> None:
        """Count an image or video of a request that passed all checks."""
        self._media.labels(kind).inc()
        if hit:
            self._hits.labels(kind).inc()

    def count_request(self, outcome: Literal["handed_on", "refused", "failed", "dropped"]) -> None:
        """Count a request that leaves this stage."""
        self._requests.labels(outcome).inc()

    def load(self) -> dict[str, float]:
        """Return the load that the lease publishes."""
        totals = {"media": value(self._media), "hits": value(self._hits), "requests": value(self._requests)}
        totals |= hop_totals()
        for stage in get_args(Stage):
            totals[f"{stage}_seconds"], totals[stage] = observed(self._seconds.labels(stage))
        recent = self._recent.growth(totals)
        return {
            "media_per_s": recent.per_second("media"),
            "requests_per_s": recent.per_second("requests"),
            **recent.ratios({"cache_hits": ("hits", "media"), "tower_s": ("tower_seconds", "tower"), **HOP}),
        }
