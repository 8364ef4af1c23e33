"""What a postproc counts."""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from shared.metrics import value
from shared.recent import Recent


class PostprocMetrics:
    """One of these a process and registry. Updated once a turn."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"millrace_postproc_{name}", text, registry=registry)

        self.tokens = counter("tokens", "Tokens folded into answers")
        self.deltas = counter("deltas", "Deltas sent to gateways")
        self.replayed = counter("replayed_tokens", "Tokens that were folded again, from a journal or a stream")
        self.journal_writes = counter("journal_writes", "Writes of a request's journal")
        self.failures = counter("failures", "Requests that ended here in an error of ours")
        self.open = Gauge(
            "millrace_postproc_open_requests",
            "Requests whose end has not been seen",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._recent = Recent()

    def figures(self) -> dict[str, float]:
        """For the lease."""
        totals = {"tokens": value(self.tokens), "deltas": value(self.deltas), "replayed": value(self.replayed)}
        recent = self._recent.look(totals)
        return {f"{name}_per_s": recent.per_second(name) for name in totals}
