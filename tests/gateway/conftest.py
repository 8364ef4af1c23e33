"""Fixtures of the gateway's tests: the demo checkpoint, its parser, and running gateways."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway_stages import Running, Stages, running
from redis.asyncio import Redis
from whole_parser import WholeParser

from cli.demo import write_demo
from services.gateway.request.chat import ChatFormat
from services.gateway.request.media import MediaRules
from services.gateway.request.model_names import ModelNames
from services.gateway.request.template import TemplateSource
from shared.bus.keys import Keys
from shared.model.generation import GenerationDefaults
from shared.model.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gateway") / "demo-model"
    write_demo(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint)


@pytest.fixture
def parser(checkpoint: Path, tokenizer: Tokenizer) -> WholeParser:
    template = TemplateSource.load(checkpoint)
    return WholeParser(
        template=template,
        chat=ChatFormat(template.name, tokenizer),
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
