"""What each service says of itself in its lease, out of what it counts."""

from prometheus_client import CollectorRegistry

from services.engine.metrics import EngineMetrics
from services.gateway.metrics import GatewayMetrics
from services.mm_encoder.metrics import Metrics as MmMetrics
from services.postproc.metrics import PostprocMetrics
from shared.rates import Recent


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in figures.items()}


def test_engine() -> None:
    metrics, clock = EngineMetrics(CollectorRegistry()), Clock()
    metrics._recent = Recent(clock)
    assert not {"prefix_hits", "guesses_right"} & metrics.load().keys(), "no prompt has been seen, no guess verified"
    clock.now = 2
    metrics.running.set(3)
    metrics.waiting.set(1)
    metrics.kv_usage.set(0.25)
    metrics.prompt_tokens.inc(400)
    metrics.prefix_hits.inc(100)
    metrics.generation_tokens.inc(60)
    metrics.preemptions.inc(1)
    metrics.observe_guesses([4, 6], [4, 2, 0], 0.02)
    for _ in range(4):
        metrics.step_seconds.observe(0.02)
    assert rounded(metrics.load()) == {
        "running": 3,
        "waiting": 1,
        "kv_usage": 0.25,
        "tokens_per_s": 30,
        "prompt_tokens_per_s": 200,
        "preemptions_per_s": 0.5,
        "prefix_hits": 0.25,
        "guesses_right": 0.6,
        "step_s": 0.02,
    }


def test_why_an_engines_requests_wait() -> None:
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry)
    metrics.running.set(3)
    metrics.waiting.set(1)
    metrics.update_waiting(6)
    for reason, number in (("capacity", 1), ("deferred", 2)):
        assert registry.get_sample_value("millrace_num_requests_waiting_by_reason", {"reason": reason}) == number
    metrics.update_waiting(3)  # fewer than a moment ago
    assert registry.get_sample_value("millrace_num_requests_waiting_by_reason", {"reason": "deferred"}) == 0


def test_answers_searched_for_tool_calls() -> None:
    registry = CollectorRegistry()
    PostprocMetrics(registry).count_tool_parsing([True, False, True])
    for outcome, number in (("tool_call", 2), ("no_tool_call", 1)):
        found = registry.get_sample_value("millrace_tool_call_parser_invocations_total", {"outcome": outcome})
        assert found == number


def test_gateway() -> None:
    metrics, clock = GatewayMetrics(CollectorRegistry()), Clock()
    metrics._recent = Recent(clock)
    metrics.load()
    clock.now = 4
    metrics.first_token.observe(0.5)
    metrics.first_token.observe(1.5)
    metrics.latency.observe(6)
    metrics.generation_tokens.inc(100)
    metrics.cancelled.inc(2)
    assert rounded(metrics.load()) == {
        "answered_per_s": 0.25,
        "answered_tokens_per_s": 25,
        "cancelled_per_s": 0.5,
        "first_token_s": 1,
        "latency_s": 6,
    }


def test_mm_encoder() -> None:
    metrics, clock = MmMetrics(CollectorRegistry()), Clock()
    metrics._recent = Recent(clock)
    metrics.load()
    clock.now = 2
    metrics.count_media("image", hit=True)
    metrics.count_media("video", hit=False)
    metrics.count_request("handed_on")
    metrics.count_request("refused")
    metrics._seconds.labels("tower").observe(0.75)
    assert rounded(metrics.load()) == {"media_per_s": 1, "requests_per_s": 1, "cache_hits": 0.5, "tower_s": 0.75}


def test_postproc() -> None:
    metrics, clock = PostprocMetrics(CollectorRegistry()), Clock()
    metrics._recent = Recent(clock)
    metrics.load()
    clock.now = 5
    metrics.tokens.inc(50)
    metrics.deltas.inc(10)
    metrics.replayed.inc(5)
    assert rounded(metrics.load()) == {"tokens_per_s": 10, "deltas_per_s": 2, "replayed_per_s": 1}
