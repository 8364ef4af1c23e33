"""Puts this folder on the path: its helpers serve the tests in the folders below. Fixtures of a small model and of a
client of the service that runs it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from redis.asyncio import Redis

from shared.bus.keys import Keys
from shared.bus.streams import send
from shared.errors import Failure
from shared.messages import Failed

if TYPE_CHECKING:  # imported where they are needed: both take seconds
    from encoder_bench import Bench
    from oracle import Model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model") / "small"


@pytest.fixture(scope="module")
def judge(directory: Path) -> "Model":
    from oracle import save_with_transformers

    return save_with_transformers(directory)


@pytest.fixture
async def bench(redis: Redis, keys: Keys, directory: Path, judge: "Model") -> "Bench":
    """With the stream that a gateway makes for itself."""
    from encoder_bench import GATEWAY, Bench

    await send(redis, keys.deltas(GATEWAY), Failed("nobody", Failure(500, "")))
    await redis.xtrim(keys.deltas(GATEWAY), maxlen=0)
    return Bench(redis, keys, directory)
