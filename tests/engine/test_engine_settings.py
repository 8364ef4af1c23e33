"""Settings that cannot be honoured are errors that name them; the number of torch's threads."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import CONFIG, SumRunner
from msgspec.structs import replace

from cli.demo import write_demo
from services.engine.__main__ import contradictions, device, speculation
from services.engine.__main__ import load as load_runner
from services.engine.kernels.quantize import Quantized
from services.engine.kernels.reference.moe import MoE
from services.engine.model.ernie import ErnieModel
from services.engine.run.runner import ModelRunner
from services.engine.schedule.speculation import Speculation
from services.engine.settings import EngineSettings, SpeculativeConfig
from shared.config import load
from shared.errors import ConfigError
from shared.model.config import chosen_quantization, load_model_config

GUESSING = SpeculativeConfig(method="ngram", num_speculative_tokens=8)


def settings(**changes: Any) -> EngineSettings:
    return EngineSettings(redis_url="unix:///x", model="m", **changes)


def test_the_defaults_are_allowed() -> None:
    settings()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_seqs": 257}, "max_num_seqs"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization"),
        ({"block_size": 0}, "block_size"),
        ({"kv_cache_bytes": 0}, "kv_cache_bytes"),
        ({"num_gpu_blocks_override": 0}, "num_gpu_blocks_override"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 8192}, "enable_chunked_prefill"),
        ({"max_num_seqs": 8, "speculative_config": GUESSING}, "num_speculative_tokens 8"),
    ],
)
def test_a_value_out_of_range_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        settings(**changes)


@pytest.mark.parametrize(
    ("setting", "asked", "served", "said"),
    [
        (None, None, None, 0),
        (None, "wint4", "wint4", 0),
        ("wint4", "wint4", "wint4", 0),
        ("wint8", "wint4", "wint8", 1),
        ("none", "wint4", None, 1),
        ("none", None, None, 0),
        ("wint8", None, "wint8", 0),
    ],
)
def test_the_setting_of_quantization_goes_before_what_the_checkpoint_asks_for(
    setting: Any, asked: Any, served: str | None, said: int
) -> None:
    config = replace(CONFIG, quantization=asked)
    assert chosen_quantization(config, setting) == served
    lines = [*contradictions(settings(quantization=setting), config)]
    assert len(lines) == said
    assert all("wint4" in line and str(setting) in line for line in lines)


def test_a_checkpoint_that_asks_for_it_is_quantised(tmp_path: Path) -> None:
    write_demo(tmp_path / "model")
    config = replace(load_model_config(tmp_path / "model"), quantization="wint4")
    told = EngineSettings(redis_url="unix:///x", model=str(tmp_path / "model"), max_model_len=64, max_num_seqs=1)
    runner, _ = load_runner(told, config, "cpu")
    assert isinstance(runner, ModelRunner)
    assert isinstance(runner.model, ErnieModel)
    layer = runner.model.weights.layers[1]
    assert isinstance(layer.mlp, MoE)
    packed = (layer.qkv, layer.mlp.text.gate_up)
    assert [weight.bits for weight in packed if isinstance(weight, Quantized)] == [8, 4]


def test_torch_computes_with_the_threads_that_are_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_demo(tmp_path / "model")
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    told = EngineSettings(
        redis_url="unix:///x", model=str(tmp_path / "model"), max_model_len=64, max_num_seqs=1, torch_threads=7
    )
    load_runner(told, load_model_config(tmp_path / "model"), "cpu")
    assert set_to == [7]


def test_quantization_is_read_from_the_environment() -> None:
    told = {"MILLRACE_REDIS_URL": "unix:///x", "MILLRACE_MODEL": "m"}
    assert load(EngineSettings, told).quantization is None
    assert load(EngineSettings, told | {"MILLRACE_QUANTIZATION": "none"}).quantization == "none"
    with pytest.raises(ConfigError, match="MILLRACE_QUANTIZATION"):
        load(EngineSettings, told | {"MILLRACE_QUANTIZATION": "wint2"})


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ('{"method": "mtp", "num_speculative_tokens": 1}', "SPECULATIVE_CONFIG: Invalid enum value 'mtp'"),
        ('{"method": "ngram", "num_speculative_tokens": 5, "model": "d"}', "unknown field `model`"),
        ('{"method": "ngram"}', "missing required field `num_speculative_tokens`"),
        ('{"method": "ngram", "num_speculative_tokens": 32}', "num_speculative_tokens 32"),
        ('{"method": "ngram", "num_speculative_tokens": 31, "prompt_lookup_min": 2, "disable_by_batch_size": 4}', None),
        ('{"method": "ngram", "num_speculative_tokens": 0}', None),
        ("null", None),
    ],
)
def test_speculation_is_asked_for_by_the_names_of_the_field(told: str, said: str | None) -> None:
    environment = {"MILLRACE_REDIS_URL": "unix:///x", "MILLRACE_MODEL": "m", "MILLRACE_SPECULATIVE_CONFIG": told}
    with nullcontext() if said is None else pytest.raises(ConfigError, match=re.escape(said)):
        limits = speculation(load(EngineSettings, environment).speculative_config, SumRunner(1, 1))
        assert limits == (Speculation(most=31, ngram=2, max_batch=4) if "31" in told else None)


def test_whole_prompts_are_allowed_where_a_step_holds_a_context() -> None:
    settings(enable_chunked_prefill=False, max_model_len=4096, max_num_batched_tokens=4096)


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


def test_more_ranks_than_devices_are_refused_with_the_number_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device(settings(tensor_parallel_size=1)) == "cuda"
    assert device(settings(tensor_parallel_size=2, device="cpu")) == "cpu"
    with pytest.raises(ConfigError, match="is 2, and torch sees 1 CUDA devices"):
        device(settings(tensor_parallel_size=2))
