"""Many at once, and clients that go away: each gets its own answer, and nothing stays behind."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from openai import AsyncOpenAI
from pipeline_judge import Judge, Question
from system import System, picture, running

MAX_TOKENS = 8
AT_ONCE = 40  # the engine takes 16


@pytest.fixture(scope="module")
def system(judge: Judge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    arguments = ["--model", str(judge.directory), "--max-num-seqs", "16"]
    with running(arguments, tmp_path_factory.mktemp("system")) as system:
        yield system


def questions() -> list[Question]:
    """As many, no two alike; every fourth with a picture, some of them the same."""
    return [
        Question(f"Question {n}?", picture(56 + 28 * (n % 3), 84, seed=n % 12) if n % 4 == 0 else None)
        for n in range(AT_ONCE)
    ]


async def tokens(client: AsyncOpenAI, question: Question, streamed: bool) -> list[int]:
    """The tokens of a greedy answer, however it is sent."""
    reply = await client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": question.content()}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=streamed,
        extra_body={"return_token_ids": True},
    )
    if not streamed:
        return list(reply.choices[0].message.model_extra["completion_token_ids"])
    deltas = [chunk.choices[0].delta.model_extra async for chunk in reply]
    return [token for delta in deltas for token in delta.get("completion_token_ids", [])]


async def test_many_at_once_each_get_their_own_answer_and_leave_nothing(system: System, judge: Judge) -> None:
    asked = questions()
    expected = [judge.answer(question, MAX_TOKENS) for question in asked]
    async with AsyncOpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=0) as client:
        answers = await asyncio.gather(*(tokens(client, question, n % 2 == 0) for n, question in enumerate(asked)))
    assert answers == expected
    assert await system.left_behind() == {}


@pytest.mark.parametrize("with_picture", [False, True], ids=["text", "image"])
async def test_a_client_that_goes_away_is_forgotten(system: System, with_picture: bool) -> None:
    """The answer would take minutes; the stages must be empty long before."""
    question = Question("Tell me everything.", picture(84, 84) if with_picture else None)
    async with AsyncOpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": question.content()}],
            max_tokens=30_000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        seen = 0
        async for _ in stream:
            seen += 1
            if seen == 5:
                break
        assert (await system.running_requests()) == 1
        await stream.close()
    assert await system.left_behind() == {}


async def test_clients_that_go_away_before_the_answer_begins_are_forgotten(system: System) -> None:
    """They wait in every stage: more than the engine takes at once, some with media still to encode."""

    async def hang_up(client: AsyncOpenAI, question: Question) -> None:
        asked: list[Any] = [{"role": "user", "content": question.content()}]
        options: dict[str, Any] = {"model": "default", "max_tokens": 30_000, "extra_body": {"ignore_eos": True}}
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.chat.completions.create(messages=asked, **options), 0.5)

    async with AsyncOpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=0) as client:
        await asyncio.gather(*(hang_up(client, question) for question in questions()))
    assert await system.left_behind() == {}
