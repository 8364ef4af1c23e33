"""The trained demo through the whole path: it answers as its card says, with the tokens that transformers generates.

DEMO_QUESTIONS and DEMO_PROMPTS ask more questions of each kind, and compare more of them with transformers.
"""

import asyncio
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from machine import PATIENCE_S
from oracle import Model, hf_generate, load_transformers
from system import System, running

from benchmarks.demo_model import card
from benchmarks.demo_model.evaluate import PROCESSOR, widened
from benchmarks.demo_model.prompt import Encoder
from benchmarks.demo_model.questions import Question, questions
from benchmarks.demo_model.sample import Sample
from services.mm_encoder.media.patches import CLIP_MEAN, CLIP_STD
from services.mm_encoder.vision.normalise import normalise

CHECKPOINT = Path(__file__).parents[2] / "cli" / "demo_checkpoint"
MESSAGES_PAGE = Path(__file__).parents[2] / "docs" / "messages.md"
PER_SET = int(os.environ.get("DEMO_QUESTIONS", "4"))
PROMPTS = int(os.environ.get("DEMO_PROMPTS", "8"))
SEED = 1  # not the questions of the card


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in float32, where transformers and we agree to the token."""
    return widened(CHECKPOINT, tmp_path_factory.mktemp("checkpoint") / "float32")


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    arguments = ["--model", str(checkpoint), "--mm-processor-kwargs", json.dumps(PROCESSOR)]
    arguments += ["--limit-mm-per-prompt", '{"image": 4}', "--max-model-len", "4096"]
    with running(arguments, tmp_path_factory.mktemp("server")) as system:
        yield system


Answered = tuple[Question, dict[str, object]]


@pytest.fixture(scope="module")
def answered(server: System) -> list[Answered]:
    """Each question with the message that came back."""
    asked = list(questions(PER_SET, SEED))

    async def ask_all() -> list[dict[str, object]]:
        gate = asyncio.Semaphore(16)
        async with httpx.AsyncClient(base_url=server.base_url, timeout=300) as client:

            async def ask(question: Question) -> dict[str, object]:
                body = question.body | {"model": "float32", "return_token_ids": True}
                async with gate:
                    response = await client.post("/v1/chat/completions", json=body)
                assert response.status_code == 200, response.text
                message: dict[str, object] = response.json()["choices"][0]["message"]
                return message

            return await asyncio.gather(*(ask(question) for question in asked))

    return list(zip(asked, asyncio.run(ask_all()), strict=True))


def test_the_example_of_the_messages_api_is_answered_as_its_page_says(server: System) -> None:
    """Except for ids, and what the prefix cache has by then."""
    body, promised = map(json.loads, re.findall(r"^    \{\n.*?^    \}$", MESSAGES_PAGE.read_text(), re.M | re.S))
    response = httpx.post(f"{server.base_url}/v1/messages", json={**body, "temperature": 0}, timeout=PATIENCE_S)
    answer = response.json()
    for one in (answer, promised):
        one["usage"]["input_tokens"] += one["usage"].pop("cache_read_input_tokens")
        one["content"][0].pop("signature")
    assert {**answer, "id": promised["id"]} == promised


def test_it_answers_as_well_as_its_card_says(answered: list[Answered]) -> None:
    promised = card.mean(card.read(CHECKPOINT)["bf16"]) / 100
    right = sum(question.is_right(message) for question, message in answered)
    margin = 2 * math.sqrt(promised * (1 - promised) / len(answered))
    assert right / len(answered) >= promised - margin, _wrong(answered)


def _wrong(answered: list[Answered]) -> str:
    lines = [f"{q.sample.answer or q.sample.calls} <- {m.get('content')}" for q, m in answered if not q.is_right(m)]
    return "\n".join(lines)


def test_prompts_are_those_it_was_trained_on(answered: list[Answered]) -> None:
    encoder = Encoder.load(CHECKPOINT)
    compared = 0
    for question, message in answered:
        if message.get("prompt_token_ids") is not None:  # not given with media
            encoded = encoder.encode(question.sample)
            assert message["prompt_token_ids"] == encoded.ids[: encoded.answer_at].tolist()
            compared += 1
    assert compared > len(answered) // 3


def test_its_tokens_are_those_transformers_generates(checkpoint: Path, answered: list[Answered]) -> None:
    model, encoder = load_transformers(checkpoint), Encoder.load(checkpoint)
    # H.264 changes what a video shows, so the frames that the server saw are not at hand.
    still = [
        (q, m) for q, m in answered if not any(isinstance(p, list) for each in q.sample.messages for p in each.parts)
    ]
    step = max(1, len(still) // PROMPTS)
    for question, message in still[::step][:PROMPTS]:
        ours = message["completion_token_ids"]
        assert isinstance(ours, list)
        assert ours == generated(model, encoder, question.sample, len(ours)), question.body["messages"][-1]["content"][
            -1
        ]


def generated(model: Model, encoder: Encoder, sample: Sample, count: int) -> list[int]:
    """transformers' greedy tokens."""
    encoded = encoder.encode(sample)
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    media = {}
    if encoded.media:
        rows = torch.cat([normalise(torch.from_numpy(each.rows), mean, std, torch.float32) for each in encoded.media])
        media["images"] = (rows, torch.tensor([each.grid for each in encoded.media]))
    return hf_generate(model, encoded.ids[: encoded.answer_at].tolist(), count, **media)
