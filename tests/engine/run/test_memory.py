"""The size of the cache: by order, by bytes, never more than can be used, and an error with numbers if too small."""

from typing import Any

import pytest
import torch
from engine_cases import CONFIG
from torch import Tensor

from services.engine.model.inputs import KVCache, StepInput
from services.engine.run.memory import CONTEXT_BYTES, DeviceMemory, allocate_cache, block_bytes, num_blocks
from services.engine.settings import EngineSettings
from shared.errors import ConfigError

BLOCK_BYTES = 2 * 2 * 1 * 4 * 16 * 4  # keys and values, layers, heads, head size, tokens, float32


class CpuModel:
    dtype = torch.float32
    device = torch.device("cpu")
    hidden_size = 8

    def forward(self, step: StepInput, cache: KVCache) -> Tensor:
        raise AssertionError("nothing to profile on a CPU")


def rehearse(logits: Tensor) -> None:
    raise AssertionError("nothing to profile on a CPU")


def settings(**changes: Any) -> EngineSettings:
    told = {"block_size": 16, "max_model_len": 100, "max_num_seqs": 3, **changes}
    return EngineSettings(redis_url="unix:///x", model="m", **told)


def blocks(**changes: Any) -> int:
    return num_blocks(CpuModel(), CONFIG, settings(**changes), rehearse)


def test_a_block_is_keys_and_values_of_all_layers() -> None:
    assert block_bytes(CONFIG, 16, torch.float32) == BLOCK_BYTES
    cache = allocate_cache(CpuModel(), CONFIG, settings(num_gpu_blocks_override=9), rehearse, 0, int)
    assert (cache.keys.nbytes + cache.values.nbytes) == 9 * BLOCK_BYTES


def test_never_more_than_all_sequences_can_fill() -> None:
    assert blocks() == 3 * 7


def test_no_more_than_its_bytes() -> None:
    assert blocks(kv_cache_bytes=10 * BLOCK_BYTES + 1) == 10


def test_an_override_wins() -> None:
    assert blocks(num_gpu_blocks_override=50, kv_cache_bytes=1) == 50


@pytest.mark.parametrize("changes", [{"kv_cache_bytes": 6 * BLOCK_BYTES}, {"num_gpu_blocks_override": 6}])
def test_too_small_for_one_context_is_an_error_with_numbers(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"max_model_len 100 needs 7 .*{next(iter(changes))}.* leaves 6 .*96 tokens"):
        blocks(**changes)


GIB = 2**30


def test_the_share_is_for_all_that_is_on_the_card() -> None:
    memory = DeviceMemory(total=20 * GIB, others=GIB, peak=10 * GIB, unreleasable=0)
    assert memory.cache_bytes(0.9, 0, graphs=GIB) == 6 * GIB
    assert DeviceMemory(20 * GIB, GIB, 10 * GIB, unreleasable=GIB // 2).cache_bytes(0.9, 0, graphs=GIB) == 5.5 * GIB


def test_who_comes_later_finds_room_and_is_not_counted_twice() -> None:
    """An encoder that takes 3 GiB, before and after it has taken them."""
    foreign, ours = 3 * GIB, CONTEXT_BYTES
    before = DeviceMemory(total=20 * GIB, others=ours, peak=10 * GIB, unreleasable=0)
    after = DeviceMemory(total=20 * GIB, others=ours + foreign, peak=10 * GIB, unreleasable=0)
    assert before.cache_bytes(0.9, foreign, 0) == after.cache_bytes(0.9, foreign, 0) == 5 * GIB - ours
