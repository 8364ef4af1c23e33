"""What Prometheus sees of a running system, all four services on one port."""

import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from machine import PATIENCE_S
from openai import OpenAI
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from system import System, data_url, encoded, picture, running

from shared.bus.keys import ENCODE, GENERATE

# What dashboards made for vLLM ask for, after the `vllm:`. It does not estimate the device's FLOPs, which vLLM does on
# request, and what guesses were right by their place is told once there are some.
VLLM = {
    "gauge": {"num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc"},
    "counter": {
        "prompt_tokens",
        "prompt_tokens_cached",
        "generation_tokens",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "mm_cache_queries",
        "mm_cache_hits",
        "num_preemptions",
        "spec_decode_num_drafts",
        "spec_decode_num_draft_tokens",
        "spec_decode_num_accepted_tokens",
        "request_success",
        "admission_rejections",
        "tool_call_parser_invocations",
    },
    "histogram": {
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "iteration_tokens_total",
    },
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
TOKENS = 12
# What engine, gateway and postproc count last of a request, which may be after its client has the answer.
LAST = (
    ("request_time_per_output_token_seconds", "_count"),
    ("request_success", "_total"),
    ("tool_call_parser_invocations", "_total"),
)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running(["--demo"], tmp_path_factory.mktemp("system")) as system:
        yield system


def scrape(system: System) -> dict[str, Metric]:
    with urllib.request.urlopen(f"http://127.0.0.1:{system.metrics_port}/metrics", timeout=PATIENCE_S) as reply:
        return {family.name: family for family in text_string_to_metric_families(reply.read().decode())}


def total(families: dict[str, Metric], name: str, suffix: str = "", **labels: str) -> float:
    samples = families[f"millrace_{name}"].samples
    wanted = [s for s in samples if s.name == f"millrace_{name}{suffix}" and labels.items() <= s.labels.items()]
    assert wanted, (name, suffix, labels)
    return sum(sample.value for sample in wanted)


def ask(system: System, content: Any, **fields: Any) -> None:
    with OpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=0) as client:
        client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": content}],
            max_tokens=TOKENS,
            extra_body={"ignore_eos": True},
            **fields,
        )


@pytest.fixture(scope="module")
def before(system: System) -> dict[str, Metric]:
    return scrape(system)


@pytest.fixture(scope="module")
def after(system: System, before: dict[str, Metric]) -> dict[str, Metric]:
    image = {"type": "image_url", "image_url": {"url": data_url(encoded(picture(56, 56), "PNG"), "image/png")}}
    content = [image, {"type": "text", "text": "What is it?"}]
    both = [threading.Thread(target=ask, args=(system, content)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    ask(system, "What is a mill race?", tools=[TOOL])
    deadline = time.monotonic() + PATIENCE_S
    while [total(scrape(system), *last) for last in LAST] != [3, 3, 1]:
        assert time.monotonic() < deadline, "what has been answered is counted"
        time.sleep(0.05)
    families = scrape(system)  # all that was counted before these
    assert total(families, "e2e_request_latency_seconds", "_count") == 3
    return families


@pytest.mark.parametrize("kind", VLLM)
def test_all_is_there_before_anything_was_asked(before: dict[str, Metric], kind: str) -> None:
    """Under vLLM's names with our prefix, each of its kind."""
    shown = {name for name, family in before.items() if family.type == kind and family.samples}
    found = {name.removeprefix("millrace_") for name in shown}
    assert found >= VLLM[kind]


def test_labels_are_those_that_dashboards_group_by(after: dict[str, Metric]) -> None:
    assert total(after, "request_success", "_total", finished_reason="length") == 3
    assert total(after, "num_requests_waiting_by_reason", reason="capacity") >= 0
    assert total(after, "num_requests_waiting_by_reason", reason="deferred") >= 0
    assert total(after, "tool_call_parser_invocations", "_total", outcome="no_tool_call") == 1
    assert total(after, "admission_rejections", "_total", reason="max_queue") == 0
    assert total(after, "mm_cache_queries", "_total", kind="image") == 2


def test_times_and_counts_of_requests(after: dict[str, Metric]) -> None:
    for name in ("time_to_first_token_seconds", "request_generation_tokens", "request_prompt_tokens"):
        assert total(after, name, "_count") == 3
    assert (
        total(after, "request_generation_tokens", "_sum") == 3 * TOKENS == total(after, "generation_tokens", "_total")
    )
    assert total(after, "request_prompt_tokens", "_sum") == total(after, "prompt_tokens", "_total")
    phases = {phase: total(after, f"request_{phase}_time_seconds", "_sum") for phase in ("queue", "prefill", "decode")}
    assert all(seconds > 0 for seconds in phases.values()), phases
    assert sum(phases.values()) < total(after, "e2e_request_latency_seconds", "_sum")
    per_token = total(after, "request_time_per_output_token_seconds", "_sum")
    assert per_token == pytest.approx(phases["decode"] / (TOKENS - 1), rel=0.01)
    assert total(after, "inter_token_latency_seconds", "_count") >= TOKENS - 1
    assert total(after, "iteration_tokens_total", "_sum") >= 3 * TOKENS


@pytest.mark.parametrize(("stream", "entries"), [(ENCODE, 2), (GENERATE, 3), ("tokens", TOKENS), ("deltas", 1)])
def test_every_hop_is_timed(before: dict[str, Metric], after: dict[str, Metric], stream: str, entries: int) -> None:
    count, seconds = (
        total(after, "hop_seconds", part, stream=stream) - total(before, "hop_seconds", part, stream=stream)
        for part in ("_count", "_sum")
    )
    assert count == entries if stream in (ENCODE, GENERATE) else count >= entries
    assert 0 <= seconds < total(after, "e2e_request_latency_seconds", "_sum") * count
