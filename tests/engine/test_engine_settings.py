"""Settings that cannot be honoured are errors that name them; the number of torch's threads."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from services.engine import __main__ as root
from services.engine.settings import EngineSettings, check
from shared.config import load
from shared.errors import ConfigError


def settings(**changes: Any) -> EngineSettings:
    return EngineSettings(redis_url="unix:///x", model="m", **changes)


def test_the_defaults_are_allowed() -> None:
    check(settings())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_seqs": 257}, "max_num_seqs"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization"),
        ({"block_size": 0}, "block_size"),
        ({"kv_cache_bytes": 0}, "kv_cache_bytes"),
        ({"num_gpu_blocks_override": 0}, "num_gpu_blocks_override"),
        ({"enable_chunked_prefill": False}, "enable_chunked_prefill"),
    ],
)
def test_a_value_out_of_range_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check(settings(**changes))


def test_whole_prompts_are_allowed_where_a_step_holds_a_context() -> None:
    check(settings(enable_chunked_prefill=False, max_model_len=4096, max_num_batched_tokens=4096))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SAMPLING_CLASS", "air"),
        ("QUANTIZATION", "wint2"),
        ("DEVICE", "tpu"),
        ("MAX_NUM_SEQS", "x"),
        ("TORCH_THREADS", "-1"),
    ],
)
def test_another_choice_is_refused_at_the_door(name: str, value: str) -> None:
    environment = {"MILLRACE_REDIS_URL": "unix:///x", "MILLRACE_MODEL": "m", f"MILLRACE_{name}": value}
    with pytest.raises(ConfigError, match=name):
        load(EngineSettings, environment)


@pytest.fixture
def six_threads() -> Iterator[None]:
    """The number torch would start by itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("wanted", "cores", "threads"), [(0, 3, 3), (0, 64, 6), (5, 3, 5), (64, 3, 64)])
def test_torch_computes_on_the_cores_there_are(
    six_threads: None, monkeypatch: pytest.MonkeyPatch, wanted: int, cores: int, threads: int
) -> None:
    monkeypatch.setattr(root, "usable_cores", lambda: cores)
    root.limit_threads(settings(torch_threads=wanted))
    assert torch.get_num_threads() == threads
