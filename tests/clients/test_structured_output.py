"""Structured output through the whole system. The weights are random: what is right is all the grammar's doing."""

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from answers import ask, assembled, collected, listen, user
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI
from schemas import Schema, check_answer, schemas
from system import System

QUESTION = user("What is the weather in Paris?")
RECORD: Schema = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "array", "items": {"enum": [1, 22]}}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def asking(system: System) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def shaped(schema: Schema) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def both(client: OpenAI, **options: Any) -> dict[str, Any]:
    """Return an answer, after checking that it is the same streamed and whole."""
    options = {"messages": QUESTION, "temperature": 1.0, "seed": 7, **options}
    whole = collected(ask(client, **options))
    assert assembled(listen(client, **options)) == whole
    return whole


@settings(max_examples=4)
@given(schema=schemas, seed=st.integers(0, 99), thinking=st.booleans())
def test_answers_to_random_schemas_are_valid_and_the_same_streamed(
    asking: OpenAI, schema: Schema, seed: int, thinking: bool
) -> None:
    extra: dict[str, Any] = {"reasoning_max_tokens": 5} if thinking else {"enable_thinking": False}
    answer = both(asking, response_format=shaped(schema), seed=seed, max_tokens=70, extra_body=extra, n=2)
    for choice in answer["choices"]:
        assert choice["finish_reason"] in ("stop", "length")
        assert bool(choice["reasoning"]) is thinking
        if choice["finish_reason"] == "stop":
            check_answer(choice["content"], schema)


ALL_OPTIONS: dict[str, dict[str, Any]] = {
    "a stop string": {"stop": [":"]},
    "min_tokens": {"extra_body": {"reasoning_max_tokens": 5, "min_tokens": 60}},
    "log-probabilities": {"logprobs": True, "top_logprobs": 2},
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": 1.0},
    "a limit": {"max_tokens": 14},
    "choices": {"n": 3},
}


@pytest.mark.parametrize("name", ALL_OPTIONS)
def test_what_else_is_asked_holds_within_the_grammar(asking: OpenAI, name: str) -> None:
    options = {"response_format": shaped(RECORD), "max_tokens": 300, "extra_body": {"reasoning_max_tokens": 5}}
    choices = both(asking, **(options | ALL_OPTIONS[name]))["choices"]
    for choice in choices:
        content = choice["content"]
        if name == "a stop string":
            assert re.fullmatch(r'\{\s*"city"', content)
            assert choice["finish_reason"] == "stop"
        elif name == "a limit":
            assert choice["finish_reason"] == "length"
            assert content.startswith("{")
        else:
            assert choice["finish_reason"] == "stop"
            check_answer(content, RECORD)
        if name == "log-probabilities":
            assert content in "".join(entry["token"] for entry in choice["logprobs"])
    assert len({choice["content"] for choice in choices}) == len(choices)


# ------------------------------------------------------------------------------------------------- hostile grammars

CHAIN = "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(3000)) + 'r3000: "a"\n'
LOOP: Schema = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
EXPLOSION = "^(([a-z]{1,100}){1,100}){1,100}$"


def nested(depth: int) -> Schema:
    schema: Schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


# param: fields of the request
HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("response_format", {"response_format": shaped({"type": "integer", "multipleOf": 9999991})}),
    ("response_format", {"response_format": shaped({"type": "string", "pattern": EXPLOSION})}),
    ("response_format", {"response_format": shaped({"type": "array", "uniqueItems": True})}),
    ("response_format", {"response_format": shaped(nested(100))}),
    ("response_format", {"response_format": shaped({"enum": [f"{n:09}" for n in range(20_000)]})}),
    ("response_format", {"response_format": shaped(LOOP)}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": "(a?){500}a{500}"}}),
    ("structured_outputs.json", {"structured_outputs": {"json": {"not": {}}}}),
    ("structured_outputs.grammar", {"structured_outputs": {"grammar": CHAIN}}),
    ("guided_grammar", {"guided_grammar": 'start: start start | "a" start'}),
    ("guided_json", {"guided_json": {"type": "string", "pattern": "(?=a)b"}}),
    ("guided_regex", {"guided_regex": "(" * 2000}),
    ("ebnf", {"ebnf": "root ::= " + "(" * 300}),
    ("regex", {"regex": "(a?){900}a{900}"}),
]


def test_hostile_grammars_are_refused_while_others_stream(asking: OpenAI) -> None:
    """Another's answers, one after the other for as long as hostile requests come, are what they are without them."""
    guided = {
        "messages": QUESTION, "temperature": 1.0, "seed": 3, "max_tokens": 60,
        "response_format": shaped({"type": "array", "items": RECORD, "minItems": 1000}),
        "extra_body": {"reasoning_max_tokens": 5},
    }  # fmt: skip
    undisturbed = assembled(listen(asking, **guided))
    over = threading.Event()

    def stream() -> list[dict[str, Any]]:
        answers = [assembled(listen(asking, **guided))]
        while not over.is_set():
            answers.append(assembled(listen(asking, **guided)))
        return answers

    with ThreadPoolExecutor(1) as pool:
        streams = pool.submit(stream)
        try:
            refused = [refusal(asking, fields) for _, fields in HOSTILE]
        finally:
            over.set()
        answers = streams.result()
    assert refused == [(400, param) for param, _ in HOSTILE]
    assert answers == [undisturbed] * len(answers)


def refusal(client: OpenAI, fields: dict[str, Any]) -> tuple[int, str | None]:
    """Return the status and the field of a request that is refused."""
    with pytest.raises(openai.APIStatusError) as refused:
        ask(client, QUESTION, extra_body=fields, max_tokens=1)
    error = json.loads(refused.value.response.content)["error"]
    return refused.value.status_code, error["param"]
