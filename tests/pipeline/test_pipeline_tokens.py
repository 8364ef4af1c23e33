"""Greedy answers through all four services and Redis are transformers' own, token by token, however steps are cut."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI
from pipeline_judge import Judge, Question
from system import System, picture, running

MAX_TOKENS = 16
LAUNCHES = {
    "as launched by default": [],
    "in chunks of 7, without prefix cache": ["--max-num-batched-tokens", "7", "--no-enable-prefix-caching"],
    "in chunks of 1": ["--max-num-batched-tokens", "1"],
    "in a cache too small for all": ["--block-size", "16", "--num-gpu-blocks-override", "40"],
}
TEXT = Question("What is in this picture?")
IMAGE = Question("Describe it.", picture(150, 100))
OTHERS = [
    *(Question(f"Please count to {n}.") for n in range(12)),
    *(Question(f"And picture {n}?", picture(84, 56 + 28 * n, seed=n + 1)) for n in range(4)),
]


@pytest.fixture(scope="module", params=LAUNCHES.values(), ids=LAUNCHES)
def system(request: pytest.FixtureRequest, judge: Judge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    arguments = ["--model", str(judge.directory), "--max-model-len", "512", *request.param]
    with running(arguments, tmp_path_factory.mktemp("system")) as system:
        yield system


@pytest.fixture(scope="module")
def answers(judge: Judge) -> dict[str, list[int]]:
    return {question.text: judge.answer(question, MAX_TOKENS) for question in [TEXT, IMAGE, *OTHERS]}


def asked(question: Question) -> dict[str, Any]:
    """The arguments of a greedy request."""
    return {
        "model": "default",
        "messages": [{"role": "user", "content": question.content()}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "extra_body": {"return_token_ids": True},
    }


@pytest.mark.parametrize("question", [TEXT, IMAGE], ids=["text", "image"])
def test_alone(system: System, judge: Judge, answers: dict[str, list[int]], question: Question) -> None:
    with OpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=0) as client:
        for _ in range(2):  # the second may find its prompt in the prefix cache
            reply = client.chat.completions.create(**asked(question))
            assert reply.choices[0].message.model_extra["completion_token_ids"] == answers[question.text]
            assert reply.usage.prompt_tokens == len(judge.prompt(question)[0])


async def test_among_sixteen_others(system: System, answers: dict[str, list[int]]) -> None:
    questions = [TEXT, IMAGE, *OTHERS]
    async with AsyncOpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=0) as client:
        replies = await asyncio.gather(*(client.chat.completions.create(**asked(question)) for question in questions))
    ids = [reply.choices[0].message.model_extra["completion_token_ids"] for reply in replies]
    assert ids == [answers[question.text] for question in questions]
