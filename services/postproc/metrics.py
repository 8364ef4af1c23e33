"""Prometheus metrics of postproc, and its load for the lease."""

from collections.abc import Iterable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from shared.metrics import HOP, at_zero, hop_totals, value
from shared.rates import Recent


class PostprocMetrics:
    """Metrics of one process and registry, updated once a turn of its loop."""

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
        self._tool_parsers = Counter(
            "millrace_tool_call_parser_invocations",
            "Answers that were searched for tool calls, since tools were offered",
            ["outcome"],
            registry=registry,
        )
        at_zero(self._tool_parsers, "tool_call", "no_tool_call")
        self._recent = Recent()

    def count_tool_parsing(self, called: Iterable[bool]) -> None:
        """Count answers that were searched for tool calls, by whether they had one."""
        for has_call in called:
            self._tool_parsers.labels("tool_call" if has_call else "no_tool_call").inc()

    def load(self) -> dict[str, float]:
        """Return the current rates, for the lease."""
        totals = {"tokens": value(self.tokens), "deltas": value(self.deltas), "replayed": value(self.replayed)}
        recent = self._recent.growth({**totals, **hop_totals()})
        return {f"{name}_per_s": recent.per_second(name) for name in totals} | recent.ratios(HOP)
