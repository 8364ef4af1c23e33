"""Trained weights served with guesses and without: the same answers to whatever a request asks for."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from machine import PATIENCE_S
from system import System, data_url, encoded, picture, running

from benchmarks.demo_model.evaluate import PROCESSOR, widened

pytestmark = pytest.mark.system
CHECKPOINT = Path(__file__).parents[2] / "cli" / "demo_checkpoint"
GUESSES = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_min": 2}
TEXT = "the mill race runs under an old stone bridge. the mill race runs under an old stone wheel. "
READING = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "degrees": {"type": "integer", "maximum": 50}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {
    "type": "array", "minItems": 6, "maxItems": 9, "items": READING}}}  # fmt: skip
DAYS = {"type": "object", "properties": {"days": {"type": "array", "minItems": 5, "items": READING}}}
TOOLS = [{"type": "function", "function": {"name": "set_weather", "parameters": {**DAYS, "required": ["days"]}}}]
OFF = {"chat_template_kwargs": {"enable_thinking": False}}
COPY = {**OFF, "guided_choice": [TEXT * 2]}
SEEDED = {"temperature": 1.0, "seed": 7}
ASKED: dict[str, dict[str, Any]] = {
    "copied": COPY,
    "cut by a limit": {**COPY, "max_tokens": 45},
    "cut by a stop string": {**COPY, "stop": ["bridge. the mill race runs under an o"]},
    "schema": {**SEEDED, **OFF, "response_format": SCHEMA, "logprobs": True, "top_logprobs": 2},
    "schema after thinking with a budget": {"response_format": SCHEMA, "reasoning_max_tokens": 9},
    "choices": {**SEEDED, **OFF, "response_format": SCHEMA, "n": 2},
    "forced call": {**SEEDED, **OFF, "tools": TOOLS, "tool_choice": "required"},
    "penalties": {**SEEDED, **COPY, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "logprobs": True},
    "free": {**SEEDED, "ignore_eos": True, "max_tokens": 60},
    "loop": {"logit_bias": {"300": 30}, "thinking_loop_repeats": 2, "thinking_loop_tokens": 4, "ignore_eos": True},
}


def body(options: dict[str, Any]) -> dict[str, Any]:
    show = {"type": "image_url", "image_url": {"url": data_url(encoded(picture(56, 56), "PNG"), "image/png")}}
    content = [show, {"type": "text", "text": f"Copy this text: {TEXT}"}]
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 120,
            "return_token_ids": True, **options}  # fmt: skip


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[System, System]]:
    """In float32, where what is computed beside a token hardly ever decides which one it is."""
    directory = tmp_path_factory.mktemp("guesses")
    arguments = ["--model", str(widened(CHECKPOINT, directory / "float32")), "--max-model-len", "1024"]
    arguments += ["--mm-processor-kwargs", json.dumps(PROCESSOR)]
    guesses = ["--speculative-config", json.dumps(GUESSES)]
    with (
        running(arguments, directory / "plain") as plain,
        running([*arguments, *guesses], directory / "guessing") as guessing,
    ):
        yield plain, guessing


def answers(system: System) -> dict[str, list[dict[str, Any]]]:
    """Return the choices of each request, four requests at a time."""

    def ask(options: dict[str, Any]) -> list[dict[str, Any]]:
        reply = httpx.post(f"{system.base_url}/v1/chat/completions", json=body(options), timeout=PATIENCE_S)
        assert reply.status_code == 200, reply.text
        choices: list[dict[str, Any]] = reply.json()["choices"]
        return choices

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(ASKED, pool.map(ask, ASKED.values()), strict=True))


def logprobs(choice: dict[str, Any]) -> list[float]:
    told = (choice.pop("logprobs") or {}).get("content") or []
    return [value["logprob"] for one in told for value in (one, *one["top_logprobs"])]


def test_answers_are_the_same_with_guesses_and_without(servers: tuple[System, System]) -> None:
    plain, guessing = (answers(system) for system in servers)
    for name in ASKED:
        for one, other in zip(plain[name], guessing[name], strict=True):
            assert logprobs(one) == pytest.approx(logprobs(other), abs=1e-3), name
            assert without_ids(one) == without_ids(other), name
    drafted, right = (
        servers[1].metric(f"millrace_spec_decode_num_{kind}_tokens_total") for kind in ("draft", "accepted")
    )
    assert drafted > right > 200
    assert servers[0].metric("millrace_spec_decode_num_drafts_total") == 0
    assert {system.metric("millrace_thinking_loops_total") for system in servers} == {1}


def without_ids(choice: dict[str, Any]) -> str:
    """Return a choice as text, without the random ids of calls."""
    return re.sub(r'"call_\w+"', '"call"', json.dumps(choice, sort_keys=True))
