"""What the gateway's tests share: the demo checkpoint and what reads it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway_stages import Running, Stages, running
from redis.asyncio import Redis

from cli.demo import write_demo
from services.gateway.chat import ChatFormat
from services.gateway.media import MediaRules
from services.gateway.model_names import ModelNames
from services.gateway.order import OrderTaker
from services.gateway.template import Template
from shared.keys import Keys
from shared.model_config import GenerationDefaults
from shared.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gateway") / "demo-model"
    write_demo(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint)


@pytest.fixture
def taker(checkpoint: Path, tokenizer: Tokenizer) -> OrderTaker:
    return OrderTaker(
        chat=ChatFormat(Template.load(checkpoint, 100_000), tokenizer),
        tokenizer=tokenizer,
        defaults=GenerationDefaults(
            temperature=0.8,
            top_p=0.7,
            top_k=5,
            repetition_penalty=1.1,
            presence_penalty=0.2,
            frequency_penalty=0.3,
            min_p=0.05,
        ),
        rules=MediaRules({"image": 2, "video": 1}, max_bytes=1000),
        names=ModelNames("demo-model"),
        max_n=4,
        max_model_len=2048,
        force_include_usage=False,
    )


@pytest.fixture
def stages(redis: Redis, keys: Keys) -> Stages:
    """The test's hand in place of every other stage."""
    return Stages(redis, keys)


@pytest.fixture
async def server(checkpoint: Path, redis_url: str) -> AsyncIterator[Running]:
    """A gateway with the settings of `running`; a module that needs others has a fixture of its own."""
    async with running(checkpoint, redis_url) as started:
        yield started


@pytest.fixture
async def other(checkpoint: Path, redis_url: str) -> AsyncIterator[Running]:
    """A second one, on the same Redis."""
    async with running(checkpoint, redis_url, name="other") as started:
        yield started
