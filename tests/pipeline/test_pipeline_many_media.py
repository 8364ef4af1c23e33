"""A hundred images and a hundred videos in one request, which is what a launch allows: all seen, and nothing left."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI
from pipeline_judge import Judge
from system import System, data_url, encoded, mp4, picture, running

from shared.bus.client import connect
from shared.bus.keys import Keys

TOKEN = 28 * 28  # pixels
SIZES = {"image_max_pixels": 4 * TOKEN, "video_min_pixels": 4 * TOKEN, "video_max_pixels": 4 * TOKEN}
MANY = 100
FRAMES = 2  # in a video
MAPPED = sys.platform == "linux" and Path("/dev/shm").is_dir()


@pytest.fixture(scope="module")
def system(judge: Judge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    limits = {"image": MANY, "video": MANY}
    flags = [
        "--limit-mm-per-prompt",
        json.dumps(limits),
        "--mm-processor-kwargs",
        json.dumps({**SIZES, "video_min_frames": FRAMES}),
    ]
    with running(["--model", str(judge.directory), *flags], tmp_path_factory.mktemp("system")) as system:
        yield system


def content() -> list[dict[str, object]]:
    """An image and a video in turns, each unlike all others."""
    parts: list[dict[str, object]] = []
    for seed in range(MANY):
        image, video = encoded(picture(56, 56, seed), "PNG"), mp4(FRAMES, 32, 32, seed=seed)
        parts.append({"type": "image_url", "image_url": {"url": data_url(image, "image/png")}})
        parts.append({"type": "video_url", "video_url": {"url": data_url(video, "video/mp4")}})
    return [*parts, {"type": "text", "text": "What do they have in common?"}]


async def embeddings_in_redis(system: System) -> int:
    """Return the bytes of blobs."""
    redis = connect(system.redis_url)
    try:
        return int(await redis.hget(Keys("millrace").blob_sizes(), "sum") or 0)
    finally:
        await redis.aclose()


async def test_a_hundred_of_each(system: System) -> None:
    messages: Any = [{"role": "user", "content": content()}]
    async with AsyncOpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=0) as client:
        first, second = [
            await client.chat.completions.create(model="default", messages=messages, max_tokens=8, seed=1)
            for _ in range(2)
        ]
    assert first.usage is not None
    details: Any = first.usage.prompt_tokens_details
    assert (details.image_tokens, details.video_tokens) == (MANY * 4, MANY * 4 * FRAMES // 2)
    assert second.choices[0].message == first.choices[0].message
    assert system.metric("millrace_mm_cache_hits_total") == 2 * MANY
    assert await system.left_behind() == {}
    bytes_in_redis = await embeddings_in_redis(system)
    assert (bytes_in_redis == 0) == MAPPED
