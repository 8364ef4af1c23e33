"""More uploads at once than the budget holds: each is answered or turned away at the door, and none loses its media."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from pipeline_judge import Judge
from system import System, data_url, encoded, picture, running

BUDGET = 30 << 20
UPLOAD = 5 << 20
AT_ONCE = 8


@pytest.fixture(scope="module")
def system(judge: Judge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    told = {"MILLRACE_BLOB_BUDGET_BYTES": str(BUDGET)}
    with running(["--model", str(judge.directory)], tmp_path_factory.mktemp("system"), told) as system:
        yield system


def content(seed: int, size: int) -> list[dict[str, object]]:
    """A picture of `size` bytes: what follows the end of a PNG is not looked at."""
    url = data_url(encoded(picture(84, 56, seed=seed), "PNG").ljust(size, b"\0"), "image/png")
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]


async def outcome(client: AsyncOpenAI, seed: int, size: int) -> tuple[int, str]:
    """Return the status, and what was said with it. The answer is long, so that uploads are there at the same time."""
    messages: Any = [{"role": "user", "content": content(seed, size)}]
    long: dict[str, Any] = {"max_tokens": 32, "extra_body": {"ignore_eos": True}}
    try:
        await client.chat.completions.create(model="default", messages=messages, **long)
    except openai.APIStatusError as error:
        told = error.status_code != 429 or error.response.headers.get("retry-after") == "1"
        return error.status_code, error.message if told else "no Retry-After"
    return 200, ""


async def test_no_request_loses_its_media_to_another(system: System) -> None:
    async with AsyncOpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=0) as client:
        told = await asyncio.gather(*(outcome(client, seed, UPLOAD) for seed in range(AT_ONCE)))
        statuses = Counter(status for status, _ in told)
        assert set(statuses) == {200, 429}, told
        refused = [text for status, text in told if status == 429]
        assert all(f"of {BUDGET // 2} bytes (half of blob_budget_bytes)" in text for text in refused), refused
        assert await system.left_behind() == {}
        assert await outcome(client, 99, UPLOAD) == (200, ""), "what has ended takes no room"


async def test_what_never_fits_is_refused_for_good(system: System) -> None:
    async with AsyncOpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=0) as client:
        status, text = await outcome(client, 0, BUDGET // 2 + 1)
    assert status == 413
    assert f"the server keeps {BUDGET // 2} at most" in text
