"""Greedy answers through all four services and Redis are transformers' own, token by token, however steps are cut."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI
from pipeline_judge import Judge, Question
from system import System, picture, running

MAX_TOKENS = 48  # long enough for many to run at once, whatever pace they arrive at
WITHOUT_CACHE = "--no-enable-prefix-caching"
# name: (flags, whether prompts are found cached, whether sequences are preempted when there are many)
LAUNCHES = {
    "as launched by default": ([], True, False),
    "in chunks of 7, without prefix cache": (["--max-num-batched-tokens", "7", WITHOUT_CACHE], False, False),
    "in chunks of 1": (["--max-num-batched-tokens", "1"], True, False),
    "in a cache too small for all": (
        ["--block-size", "4", "--num-gpu-blocks-override", "50", WITHOUT_CACHE],
        False,
        True,
    ),
}
TEXT = Question("What is in this picture?")
IMAGE = Question("Describe it.", picture(150, 100))
OTHERS = [
    *(Question(f"Please count to {n}.") for n in range(12)),
    *(Question(f"And picture {n}?", picture(84, 56 + 28 * n, seed=n + 1)) for n in range(4)),
]


@pytest.fixture(scope="module", params=LAUNCHES)
def launched(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def system(launched: str, judge: Judge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    arguments = ["--model", str(judge.directory), "--max-model-len", "200", *LAUNCHES[launched][0]]
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
            assert reply.choices[0].message.model_extra["prompt_token_ids"] == judge.prompt(question)[0]
            assert reply.usage.prompt_tokens == len(judge.prompt(question)[0])
        first, *others = [
            chunk.choices[0].delta for chunk in client.chat.completions.create(**asked(question), stream=True)
        ]
        assert (first.role, first.model_extra["prompt_token_ids"]) == ("assistant", judge.prompt(question)[0])
        assert not any("prompt_token_ids" in other.model_extra for other in others)


async def test_among_sixteen_others(system: System, launched: str, answers: dict[str, list[int]]) -> None:
    questions = [TEXT, IMAGE, *OTHERS]
    async with AsyncOpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=0) as client:
        replies = await asyncio.gather(*(client.chat.completions.create(**asked(question)) for question in questions))
    ids = [reply.choices[0].message.model_extra["completion_token_ids"] for reply in replies]
    assert ids == [answers[question.text] for question in questions]
    _, cached, preempted = LAUNCHES[launched]
    assert (system.metric("millrace_prefix_cache_hits_total") > 0) is cached
    assert (system.metric("millrace_num_preemptions_total") > 0) is preempted


async def test_choices_are_what_each_seed_alone_would_be(system: System) -> None:
    # Few tokens, so that none is likely to hang on how sums are rounded (near_ties.py).
    options = {**asked(TEXT), "temperature": 1.0, "top_p": 0.9, "max_tokens": 12}
    async with AsyncOpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=0) as client:
        both = await client.chat.completions.create(**options, n=2, seed=5)
        alone = [await client.chat.completions.create(**options, seed=seed) for seed in (5, 6)]
    ids = [choice.message.model_extra["completion_token_ids"] for choice in both.choices]
    assert ids == [reply.choices[0].message.model_extra["completion_token_ids"] for reply in alone]
    assert ids[0] != ids[1]
    assert both.usage.completion_tokens == sum(reply.usage.completion_tokens for reply in alone)
