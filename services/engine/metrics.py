"""Metrics of the engine. Names after the `millrace_` are vLLM's where it has the metric."""

from collections.abc import Mapping, Sequence

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from shared.metrics import HOP, hop_totals, observed, value
from shared.rates import Recent

# From a decode step on a GPU to a long prefill on a CPU.
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
PHASE_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class EngineMetrics:
    """Counters, gauges and histograms of one process and registry, updated once a step."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"millrace_{name}", text, registry=registry, multiprocess_mode="livesum")

        def counter(name: str, text: str) -> Counter:
            return Counter(f"millrace_{name}", text, registry=registry)

        self.running = gauge("num_requests_running", "Sequences that hold cache blocks")
        self.waiting = gauge("num_requests_waiting", "Sequences that wait for the scheduler")
        self.kv_usage = gauge("kv_cache_usage_perc", "Share of the cache blocks in use, 0 to 1")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of the prompts begun")
        self.cached_tokens = counter("prompt_tokens_cached", "Of these, tokens found in the prefix cache")
        self.generation_tokens = counter("generation_tokens", "Tokens generated")
        self.prefix_queries = counter("prefix_cache_queries", "Tokens looked for in the prefix cache")
        self.prefix_hits = counter("prefix_cache_hits", "Of these, tokens found")
        self.preemptions = counter("num_preemptions", "Times a sequence lost its blocks to an earlier one")
        self.drafts = counter(
            "spec_decode_num_drafts", "Times that guesses behind a sequence's last token were verified"
        )
        self.draft_tokens = counter("spec_decode_num_draft_tokens", "Tokens guessed and verified by a step")
        self.accepted_tokens = counter("spec_decode_num_accepted_tokens", "Of these, tokens that were drawn as well")
        self.accepted_at = Counter(
            "millrace_spec_decode_num_accepted_tokens_per_pos",
            "Of these, tokens by their place among those guessed together; the first is 0",
            ["position"],
            registry=registry,
        )
        self.verifying_seconds = counter("spec_decode_step_seconds", "Time of the steps that verified guesses")
        self.first_uses = counter("kernel_first_uses", "Kernels compiled, or plans made, after the engine was ready")
        self.loops = counter("thinking_loops", "Times that the thinking was closed since it repeated itself")
        self.finished = Counter("millrace_engine_finished", "Requests ended", ["reason"], registry=registry)
        self.step_tokens = Histogram(
            "millrace_iteration_tokens_total",
            "Tokens of one step, prefill and decode",
            buckets=STEP_TOKENS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "millrace_inter_token_latency_seconds",
            "From the tokens of one step to those of the next: one observation a step, for all sequences in it",
            buckets=STEP_SECONDS,
            registry=registry,
        )
        self.step_seconds = Histogram(
            "millrace_engine_step_seconds", "Time of one step", buckets=STEP_SECONDS, registry=registry
        )
        self.step_age = Gauge(
            "millrace_engine_step_age_seconds",
            "Age of the step under way, seen from beside; 0: none",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.waiting_by_reason = Gauge(
            "millrace_num_requests_waiting_by_reason",
            "capacity: wait for the scheduler; deferred: taken, and their embeddings or journals are being read",
            ["reason"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._phases = {
            phase: Histogram(f"millrace_request_{phase}_time_seconds", text, buckets=PHASE_SECONDS, registry=registry)
            for phase, text in (
                ("queue", "From a request's entry in the stream of work to its first step here"),
                ("prefill", "From its first step to its first token"),
                ("decode", "From its first token to its end"),
            )
        }
        self._per_token = Histogram(
            "millrace_request_time_per_output_token_seconds",
            "Mean time between a request's tokens, one observation a request",
            buckets=STEP_SECONDS,
            registry=registry,
        )
        self._recent = Recent()

    def observe_request(self, seconds: Mapping[str, float], generated: int) -> None:
        """Record a request answered to its end: `seconds` by phase, and the tokens generated here."""
        for phase, took in seconds.items():
            self._phases[phase].observe(max(0.0, took))
        if "decode" in seconds and generated > 1:
            self._per_token.observe(seconds["decode"] / (generated - 1))

    def observe_guesses(self, verified: Sequence[int], right: Sequence[int], seconds: float) -> None:
        """Record a step that verified guesses, and for each sequence how many it had and how many were right."""
        self.drafts.inc(len(verified))
        self.draft_tokens.inc(sum(verified))
        self.accepted_tokens.inc(sum(right))
        for position in range(max(right, default=0)):
            self.accepted_at.labels(position).inc(sum(count > position for count in right))
        self.verifying_seconds.inc(seconds)

    def update_waiting(self, held: int) -> None:
        """Set the gauges of waiting requests from the number of all that this engine has taken."""
        waiting = value(self.waiting)
        self.waiting_by_reason.labels("capacity").set(waiting)
        self.waiting_by_reason.labels("deferred").set(max(0.0, held - value(self.running) - waiting))

    def load(self) -> dict[str, float]:
        """Return the load that the lease publishes."""
        step_seconds, steps = observed(self.step_seconds)
        totals = {
            "prompt": value(self.prompt_tokens),
            "generated": value(self.generation_tokens),
            "hits": value(self.prefix_hits),
            "preemptions": value(self.preemptions),
            "guessed": value(self.draft_tokens),
            "right": value(self.accepted_tokens),
            "steps": steps,
            "step_seconds": step_seconds,
            **hop_totals(),
        }
        recent = self._recent.growth(totals)
        return {
            "running": value(self.running),
            "waiting": value(self.waiting),
            "kv_usage": value(self.kv_usage),
            "tokens_per_s": recent.per_second("generated"),
            "prompt_tokens_per_s": recent.per_second("prompt"),
            "preemptions_per_s": recent.per_second("preemptions"),
            **recent.ratios(
                {
                    "prefix_hits": ("hits", "prompt"),
                    "guesses_right": ("right", "guessed"),
                    "step_s": ("step_seconds", "steps"),
                    **HOP,
                }
            ),
        }
