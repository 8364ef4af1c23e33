"""Files with several groups of targets, chosen by the compressed-tensors library itself: its numbers, or a refusal."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_files import with_groups, write_chosen
from safetensors.torch import load_file, save_file
from test_quantised_checkpoints import load, logits

from services.engine.kernels.quantize import Quantized
from services.engine.kernels.reference.moe import MoE
from shared.errors import CheckpointError
from shared.model.checkpoint import Checkpoint
from shared.model.config import load_model_config

INT4 = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}
UNEVEN = INT4 | {"symmetric": False}
INT8 = {"num_bits": 8, "strategy": "channel", "symmetric": True}
FIRST = "model.layers.0.self_attn."
# The least exact targets first: neither their order nor the groups' counts.
GROUPS: tuple[tuple[list[str], dict[str, Any]], ...] = (
    (["Linear"], INT8),
    ([r"re:.*\.experts\.\d+\..*_proj", f"re:{FIRST}.*"], INT4),
    ([f"{FIRST}{name}_proj" for name in "qkv"], UNEVEN),
)


def written(checkpoint_dir: Path, target: Path, **changes: Any) -> tuple[Path, Path]:
    choose, config = with_groups(*GROUPS, ignore=("lm_head", r"re:.*layers\.1\.self_attn"))
    return write_chosen(checkpoint_dir, target, choose, config | changes)


def change_tensors(directory: Path, without: str = "", more: dict[str, torch.Tensor] | None = None) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    if without:
        del tensors[without]
    save_file(tensors | (more or {}), path)


@pytest.mark.parametrize("mixed", [False, True])
def test_logits_are_those_of_the_dequantised_weights(checkpoint_dir: Path, tmp_path: Path, mixed: bool) -> None:
    """With each group's format in itself, as llm-compressor writes several, or in one place."""
    quantised, dequantised = written(checkpoint_dir, tmp_path)
    if mixed:
        path = quantised / "config.json"
        config = json.loads(path.read_bytes())
        asked = config["quantization_config"]
        groups = {name: group | {"format": asked["format"]} for name, group in asked["config_groups"].items()}
        asked |= {"format": "mixed-precision", "config_groups": groups}
        path.write_text(json.dumps(config))
    model = load(quantised)
    first, second, *_ = model.weights.layers
    assert isinstance(first.qkv, Quantized)
    assert first.qkv.bits == 4
    assert isinstance(first.out, Quantized)
    assert first.out.bits == 4
    assert not isinstance(second.qkv, Quantized), "it is ignored"
    assert isinstance(second.mlp, MoE)
    assert isinstance(second.mlp.shared.down, Quantized)
    assert isinstance(second.mlp.text.down, Quantized)
    assert (second.mlp.shared.down.bits, second.mlp.text.down.bits) == (8, 4)
    assert torch.equal(logits(model), logits(load(dequantised)))


def test_zero_points_are_missing_where_the_module_s_own_group_has_them(checkpoint_dir: Path, tmp_path: Path) -> None:
    """Other modules of the same bits and groups have none."""
    quantised, _ = written(checkpoint_dir, tmp_path)
    change_tensors(quantised, without=f"{FIRST}k_proj.weight_zero_point")
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_proj\.weight_zero_point is missing"):
        load(quantised)


def test_a_quantised_cache_is_not_applied_and_said(checkpoint_dir: Path, tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    quantised, dequantised = written(checkpoint_dir, tmp_path, kv_cache_scheme=scheme)
    change_tensors(quantised, more={f"{FIRST}{name}_scale": torch.ones(1) for name in "kv"})
    assert torch.equal(logits(load(quantised)), logits(load(dequantised)))
    said = [*load_model_config(quantised).warnings, *Checkpoint(quantised).warnings]
    assert any("kv_cache_scheme is not applied" in text for text in said)
    assert any("tensors ignored: 2 of a quantised cache" in text for text in said)
