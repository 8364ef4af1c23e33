"""Directories of other formats are named for what they are; those that are read are let through."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantised_files  # noqa: F401 - makes transformers importable, which the library imports
import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme
from safetensors.torch import save_file
from transformers import AwqConfig, BitsAndBytesConfig, FineGrainedFP8Config, GPTQConfig

from cli.demo import write_demo
from shared.errors import CheckpointError
from shared.model.checkpoint import Checkpoint
from shared.model.foreign_checkpoints import INDEX, refuse_foreign

Q_PROJ = "model.layers.0.self_attn.q_proj"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5368709120\n"
HUB = "baidu/ERNIE-4.5-VL-28B-A3B-Thinking"


def packed_by(group: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors, with these fields of its group and of its weights."""
    form = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": form | weights} | (group or {})}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def directory(path: Path, tensors: list[str], config: dict[str, Any] | None = None) -> Path:
    """A directory whose one safetensors file has tensors of these names."""
    save_file({name: torch.zeros(2, 2) for name in tensors}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config or {}))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        refuse_foreign(path)
    text = str(refused.value)
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("names", "called"),
    [
        (["ernie.layers.0.self_attn.qkv_proj.weight"], "Paddle format"),
        (["model.layers.0.mlp.up_gate_proj.weight"], "Paddle format"),
        (["ernie.layers.1.mlp.experts.0.down_proj.quant_weight"], "quantised by FastDeploy ahead of time"),
        (["language_model.model.layers.0.input_layernorm.weight"], "MLX's format"),
        (["model.layers.1.mlp.switch_mlp.up_proj.weight"], "MLX's format"),
        ([f"{Q_PROJ}.scales", f"{Q_PROJ}.biases"], "MLX's format"),
        ([f"{Q_PROJ}.weight_packed", f"{Q_PROJ}.weight_scale"], "quantised by compressed-tensors"),
        ([f"{Q_PROJ}.qweight", f"{Q_PROJ}.qzeros", f"{Q_PROJ}.scales", f"{Q_PROJ}.g_idx"], "quantised by GPTQ"),
        ([f"{Q_PROJ}.qweight", f"{Q_PROJ}.qzeros", f"{Q_PROJ}.scales"], "quantised by AWQ"),
        ([f"{Q_PROJ}.weight", f"{Q_PROJ}.weight.quant_map"], "quantised by bitsandbytes"),
        ([f"{Q_PROJ}.weight", f"{Q_PROJ}.SCB"], "quantised by bitsandbytes"),
        ([f"{Q_PROJ}.weight", f"{Q_PROJ}.weight_scale_inv"], "quantised by FP8"),
        ([f"{Q_PROJ}.weight", f"{Q_PROJ}.weight_scale"], "a method that config.json does not name"),
        ([f"{Q_PROJ}.trellis"], "quantised by ExLlamaV3"),
    ],
)
def test_formats_by_the_names_of_their_tensors(tmp_path: Path, names: list[str], called: str) -> None:
    text = refusal(directory(tmp_path, names))
    assert called in text
    assert HUB in text
    assert any(f"tensor {name} " in text for name in names)


@pytest.mark.parametrize("name", ["ernie.embed_tokens.weight", f"{Q_PROJ}.qweight"])
def test_an_index_is_enough(tmp_path: Path, name: str) -> None:
    index = {"weight_map": {name: "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert name in refusal(tmp_path)


@pytest.mark.parametrize(
    ("quantization", "called"),
    [
        (AwqConfig(bits=4).to_dict(), "quantised by awq, and there is no tensor *.qweight"),
        (GPTQConfig(bits=4).to_dict(), "quantised by gptq, and there is no tensor *.qweight"),
        (GPTQConfig(bits=4, desc_act=True).to_dict(), "desc_act is True; what is read is False"),
        (GPTQConfig(bits=3).to_dict(), "bits is 3; what is read is 4 or 8"),
        (GPTQConfig(bits=4, group_size=16).to_dict(), "group_size is 16"),
        (AwqConfig(bits=4, version="gemv").to_dict(), "version is 'gemv'"),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:exllamav2"}, "AutoRound"),
        ({"quant_method": "auto-round", "bits": 2, "packing_format": "auto_round:auto_gptq"}, "bits is 2"),
        (BitsAndBytesConfig(load_in_4bit=True).to_dict(), "bitsandbytes"),
        (FineGrainedFP8Config().to_dict(), "FP8"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "config_groups is None"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "format is 'float-quantized'"),
        (packed_by(num_bits=3), "config_groups.group_0.weights.num_bits is 3; what is read is 4 or 8"),
        (packed_by(type="float"), "weights.type is 'float'"),
        (packed_by(group_size=16), "weights.group_size is 16; what is read is 128 or 64 or 32"),
        (packed_by(strategy="tensor"), "weights.strategy is 'tensor'; what is read is 'group' or 'channel'"),
        (packed_by(symmetric="no"), "weights.symmetric is 'no'; what is read is True or False"),
        (packed_by(actorder="group"), "weights.actorder is 'group'"),
        (packed_by({"input_activations": {"num_bits": 8}}), "config_groups.group_0.input_activations is {'num_bits'"),
        (
            packed_by({"targets": ["re:model.(layers"]}),
            "config_groups.group_0.targets has 're:model.(layers', which is no regular expression",
        ),
        (packed_by(), "quantised by compressed-tensors, and there is no tensor *.weight_packed"),
        ({"quant_method": "quark"}, "quark"),
        ({"group_size": 64, "bits": 4}, "a method it does not name"),
        ({"quantization": "wint4", "is_quantized": True}, "FastDeploy has quantised"),
        ({"quantization": "wint2", "dense_quant_type": "wint8", "moe_quant_type": "w4w2"}, "FastDeploy has quantised"),
        ({"quantization": "block_wise_fp8", "is_quantized": False}, "asks for FastDeploy's 'block_wise_fp8'"),
    ],
)
def test_formats_by_quantization_config(tmp_path: Path, quantization: dict[str, Any], called: str) -> None:
    """As transformers' own classes write it, where it has one that needs no other package."""
    text = refusal(directory(tmp_path, [f"{Q_PROJ}.weight"], {"quantization_config": quantization}))
    assert "config.json's quantization_config" in text
    assert called in text


READ = ("W4A16", "W4A16_ASYM", "W8A16")
CALLED = {
    "float-quantized": "FP8",
    "nvfp4-pack-quantized": "NVFP4",
    "mxfp4-pack-quantized": "MXFP4",
    "mxfp6-pack-quantized": "MXFP6",
    "mxfp8-quantized": "MXFP8",
    "int-quantized": "integers, with quantised activations",
}


@pytest.mark.parametrize("preset", sorted(PRESET_SCHEMES.keys() - {"UNQUANTIZED"}))
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed"])
def test_every_preset_of_the_library_is_read_or_named(tmp_path: Path, preset: str, mixed: bool) -> None:
    """Alone, and as the second group of a file of mixed precision."""
    schemes = [preset_name_to_scheme(name, ["Linear"]) for name in (("W4A16", preset) if mixed else (preset,))]
    formats = [infer_module_format(torch.nn.Linear, scheme).value for scheme in schemes]
    groups = {f"group_{i}": scheme.model_dump(mode="json") for i, scheme in enumerate(schemes)}
    groups = {name: group | {"format": form} for (name, group), form in zip(groups.items(), formats, strict=True)}
    config = {"quant_method": "compressed-tensors", "config_groups": groups}
    config |= {"format": "mixed-precision" if mixed else formats[0]}
    tensors = [f"{Q_PROJ}.weight_packed", f"{Q_PROJ}.weight_scale"]
    path = directory(tmp_path, tensors, {"quantization_config": config})
    if preset in READ:
        refuse_foreign(path)
        return
    text = refusal(path)
    assert text.startswith("config.json's quantization_config: ")
    assert (
        f"format is {formats[-1]!r} ({CALLED[formats[-1]]});" in text if formats[-1] in CALLED else "num_bits" in text
    )
    assert not mixed or "config_groups.group_1." in text
    assert f"use the unquantised safetensors repository instead ({HUB})" in text


@pytest.mark.parametrize(
    ("file", "called"),
    [
        ("ERNIE-4.5-VL-28B-A3B-Thinking-Q4_K_M.gguf", "GGUF, llama.cpp's format"),
        ("model_state.pdparams", "Paddle format"),
        ("model_state-00001-of-00004.pdparams", "Paddle format"),
        ("pytorch_model.bin", "pickled by PyTorch"),
        ("pytorch_model.bin.index.json", "pickled by PyTorch"),
        ("consolidated.00.pth", "pickled by PyTorch"),
    ],
)
def test_formats_by_their_files(tmp_path: Path, file: str, called: str) -> None:
    (tmp_path / file).write_bytes(b"GGUF\x03\x00\x00\x00")
    text = refusal(tmp_path)
    assert text.startswith(file)
    assert called in text


def test_files_of_other_formats_beside_safetensors_are_leftovers(tmp_path: Path) -> None:
    for name in ("model.gguf", "model_state.pdparams", "pytorch_model.bin"):
        (tmp_path / name).touch()
    refuse_foreign(directory(tmp_path, [f"{Q_PROJ}.weight"]))


def test_transposed_projections_are_paddles(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file({name: torch.zeros(8, 2)}, tmp_path / "model.safetensors")
    assert refusal(tmp_path).startswith(f"tensor {name} has the shape [8, 2], transposed as in Paddle format")
    save_file({name: torch.zeros(2, 8)}, tmp_path / "model.safetensors")
    refuse_foreign(tmp_path)


@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", "tokenizer.model"])
def test_a_clone_without_git_lfs(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text(LFS)
    assert refusal(tmp_path) == (
        f"{file} is a Git LFS pointer and not the file itself; run `git lfs pull` where the repository was cloned"
    )


def test_pointers_that_no_service_reads_stay(tmp_path: Path) -> None:
    """As of `git lfs pull --include "*.safetensors"`, and of shards that the index does not name."""
    (tmp_path / "street.png").write_text(LFS)
    refuse_foreign(directory(tmp_path, [f"{Q_PROJ}.weight"]))
    (tmp_path / "consolidated.safetensors").write_text(LFS)
    assert "consolidated.safetensors is a Git LFS pointer" in refusal(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {f"{Q_PROJ}.weight": "model.safetensors"}}))
    refuse_foreign(tmp_path)


def test_the_root_of_a_hub_cache(tmp_path: Path) -> None:
    (tmp_path / "snapshots" / "5b0b").mkdir(parents=True)
    assert "below snapshots/" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    refuse_foreign(tmp_path)


def test_an_adapter(tmp_path: Path) -> None:
    save_file({"base_model.model.lora_A.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "PEFT adapter" in refusal(tmp_path)


@pytest.mark.parametrize(
    "quantization", [None, {}, {"quantization": "wint4", "is_quantized": False}], ids=["null", "empty", "online"]
)
def test_what_is_read_is_let_through(tmp_path: Path, quantization: dict[str, Any] | None) -> None:
    config = {"hidden_size": 2, "quantization_config": quantization}
    refuse_foreign(directory(tmp_path, [f"{Q_PROJ}.weight", "model.layers.0.self_attn.k_proj.weight"], config))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def promises_too_much(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + b"{}")


def no_object(path: Path) -> None:
    path.write_bytes((2).to_bytes(8, "little") + b"[]")


def nested_too_deep(path: Path) -> None:
    header = b'{"a":' + b"[" * 100_000
    path.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize("spoil", [empty, promises_too_much, no_object, nested_too_deep])
def test_what_cannot_be_read_is_left_to_its_reader(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors.index.json").write_text("[" * 100_000)
    refuse_foreign(tmp_path)
    refuse_foreign(tmp_path / "absent")


def test_opening_a_checkpoint_asks_first(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Paddle format"):
        Checkpoint(directory(tmp_path, ["ernie.embed_tokens.weight"]))


def test_the_demo_is_not_foreign(tmp_path: Path) -> None:
    write_demo(tmp_path / "demo")
    refuse_foreign(tmp_path / "demo")
