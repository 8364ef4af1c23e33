"""Settings of postproc, and the service built from them."""

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from cli.demo_tokenizer import write_tokenizer
from services.postproc.__main__ import build
from services.postproc.settings import PostprocSettings
from services.postproc.text.answer import Parsers
from shared import config
from shared.errors import CheckpointError, ConfigError

BASE = {"MILLRACE_REDIS_URL": "unix:///nowhere", "MILLRACE_MODEL": "/nowhere"}


@pytest.mark.parametrize(
    ("reasoning", "tools", "parsers"),
    [
        (None, None, Parsers(True, True)),
        ("ernie-45-vl-thinking", "", Parsers(True, False)),
        ("", "ernie-45-vl-thinking", Parsers(False, True)),
    ],
)
def test_parsers_by_name(reasoning: str | None, tools: str | None, parsers: Parsers) -> None:
    given = {"MILLRACE_REASONING_PARSER": reasoning, "MILLRACE_TOOL_CALL_PARSER": tools}
    environ = BASE | {name: value for name, value in given.items() if value is not None}
    assert config.load(PostprocSettings, environ).parsers() == parsers


def test_calls_in_reasoning_can_be_turned_off() -> None:
    environ = BASE | {"MILLRACE_TOOL_CALLS_IN_REASONING": "false"}
    assert config.load(PostprocSettings, environ).parsers() == Parsers(True, True, False)


@pytest.mark.parametrize("name", ["MILLRACE_REASONING_PARSER", "MILLRACE_TOOL_CALL_PARSER"])
def test_an_unknown_parser_is_an_error_that_lists_the_known(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 'erine-45-vl-thinking'; known: 'ernie-45-vl-thinking'"):
        config.load(PostprocSettings, BASE | {name: "erine-45-vl-thinking"})


@pytest.mark.parametrize("field", ["journal_every", "read_count", "trim_every", "deltas_max_len"])
def test_nothing_can_be_done_every_zero_tokens(field: str) -> None:
    with pytest.raises(ConfigError, match=config.variable(field)):
        config.load(PostprocSettings, BASE | {config.variable(field): "0"})


async def test_put_together_from_a_model_directory(redis: Redis, redis_url: str, tmp_path: Path) -> None:
    settings = PostprocSettings(redis_url=redis_url, model=str(tmp_path), name="p1")
    with pytest.raises(CheckpointError):
        build(settings, redis, CollectorRegistry())
    write_tokenizer(tmp_path)
    worker = build(settings, redis, CollectorRegistry())
    await worker.startup()
    assert worker.load().items() >= {"open": 0.0, "shards": 0.0}.items()
