"""What settings leave open is decided by the device, once, and what is set stays."""

import logging
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from redis.asyncio import Redis

from cli.demo import write_demo
from services.engine import __main__ as service
from services.engine.device_defaults import CARD_TOKENS, CPU_TOKENS, SMALL_CARD_TOKENS, decide
from services.engine.settings import EngineSettings

CPU, A30, L20, H200 = None, int(23.5 * 2**30), int(44.5 * 2**30), int(139.8 * 2**30)


def settings(**told: Any) -> EngineSettings:
    return EngineSettings(redis_url="unix:///x", model="m", **told)


@pytest.mark.parametrize(
    ("card", "told", "tokens"),
    [
        (CPU, {}, CPU_TOKENS),
        (A30, {}, SMALL_CARD_TOKENS),
        (L20, {}, CARD_TOKENS),
        (H200, {}, CARD_TOKENS),
        (CPU, {"max_num_batched_tokens": 8192}, 8192),
        (H200, {"max_num_batched_tokens": 7}, 7),
        (CPU, {"enable_chunked_prefill": False, "max_model_len": 4096}, 4096),
        (H200, {"enable_chunked_prefill": False, "max_model_len": 4096}, CARD_TOKENS),
    ],
)
def test_the_tokens_of_a_step(card: int | None, told: dict[str, Any], tokens: int) -> None:
    decided = decide(settings(**told), card)
    assert decided.max_num_batched_tokens == tokens
    assert decide(decided, card) == decided


@pytest.mark.parametrize(("told", "said"), [({}, [f"max_num_batched_tokens is {CPU_TOKENS} on this device"]),
                                            ({"max_num_batched_tokens": 64}, [])])  # fmt: skip
def test_the_service_is_built_of_what_was_decided_and_says_so(
    told: dict[str, Any],
    said: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[EngineSettings] = []
    monkeypatch.setattr(service, "compose", lambda settings, *parts: built.append(settings))
    monkeypatch.setattr(service, "EngineMetrics", lambda: None)
    write_demo(tmp_path / "model")
    asked = settings(device="cpu", max_model_len=64, step_timeout_s=0.0, **told)
    with caplog.at_level(logging.INFO):
        service.build(replace(asked, model=str(tmp_path / "model")), Redis(unix_socket_path="/nowhere"))
    assert [record.getMessage() for record in caplog.records if "on this device" in record.getMessage()] == said
    assert [each.max_num_batched_tokens for each in built] == [told.get("max_num_batched_tokens", CPU_TOKENS)]
