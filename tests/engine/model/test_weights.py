"""Reading the decoder: the right tensor in the right place, or an error that names it; and its quantised forms."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import hub_files
import pytest
import torch
from decoder_judge import Judge
from msgspec.structs import replace
from paged_driver import Driver
from safetensors.torch import load_file, save_file
from torch import Tensor

from cli.demo import hub_config
from services.engine.__main__ import weights_of
from services.engine.kernels.ops import Ops
from services.engine.kernels.quantize import Quantized, dense
from services.engine.kernels.reference.mlp import SwiGLU
from services.engine.kernels.reference.moe import MoE
from services.engine.model.ernie import ErnieModel, Weights
from services.engine.model.weights import load_model, load_weights
from services.engine.settings import EngineSettings
from shared.errors import CheckpointError
from shared.model.checkpoint import Checkpoint
from shared.model.config import load_model_config
from shared.model.config_file import Quantization

Tensors = dict[str, Tensor]

TEXT = [5, 6, 7, 8, 33, 1, 77, 2, 64, 12, 9]
IMAGE = ("image", (1, 4, 6))


@pytest.fixture(scope="session")
def tensors(checkpoint_dir: Path) -> Tensors:
    return {name: tensor for path in checkpoint_dir.glob("*.safetensors") for name, tensor in load_file(path).items()}


def rewritten(tensors: Tensors, source: Path, target: Path) -> Path:
    """A model directory with these tensors instead."""
    target.mkdir()
    shutil.copyfile(source / "config.json", target / "config.json")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target


def load(directory: Path, quantization: Quantization | None = None, **changes: object) -> ErnieModel:
    config = replace(load_model_config(directory), **changes)
    return load_model(Checkpoint(directory), config, "cpu", quantization, Ops())


def tensors_of(part: object) -> list[Tensor]:
    """Every tensor inside, once each."""
    if isinstance(part, Tensor):
        return [part]
    if isinstance(part, tuple):
        return [tensor for item in part for tensor in tensors_of(item)]
    if is_dataclass(part):
        return [tensor for field in fields(part) for tensor in tensors_of(getattr(part, field.name))]
    return []


def nbytes(weights: Weights) -> int:
    return sum({t.data_ptr(): t.nbytes for t in tensors_of(weights)}.values())


@pytest.mark.parametrize("variant", [dict, hub_files.base], ids=["thinking", "base"])
@pytest.mark.parametrize(
    "absent", [(), ("freq_allocation",), ("rope_scaling",), ("moe_layer_end_index", "moe_layer_interval")]
)
def test_a_directory_as_the_hub_has_it_gives_transformers_numbers(
    judge: Judge, tensors: Tensors, tmp_path: Path, variant: Callable[..., dict[str, Any]], absent: tuple[str, ...]
) -> None:
    """The hub's keys, in the spellings there are of them, and tensors beside the model's own."""
    directory = tmp_path / "hub"
    directory.mkdir()
    config = variant(hub_config("float32"))
    written = {key: value for key, value in config.items() if key not in absent}
    (directory / "config.json").write_text(json.dumps(written))
    beside = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
        "model.mtp_block.0.self_attn.q_proj.weight": torch.ones(8, 8),
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in (tensors | beside).items()}, directory / "model.safetensors"
    )
    sequence, expected = judge.prompt(TEXT, IMAGE, [7])
    torch.testing.assert_close(Driver(load(directory)).run(sequence, 5), expected, rtol=0, atol=2e-4)


def test_tied_head_is_the_embedding(model: ErnieModel, tensors: Tensors) -> None:
    assert "lm_head.weight" not in tensors
    assert model.weights.head is model.weights.embedding


def test_a_stored_copy_of_the_embedding_is_not_kept_twice(
    tensors: Tensors, checkpoint_dir: Path, tmp_path: Path
) -> None:
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    loaded = load(rewritten(tensors | copy, checkpoint_dir, tmp_path / "new"))
    assert loaded.weights.head is loaded.weights.embedding


@pytest.mark.parametrize("tied", [True, False])
def test_a_stored_head_that_differs_counts(
    judge: Judge, tensors: Tensors, checkpoint_dir: Path, tmp_path: Path, tied: bool
) -> None:
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].flip(0) * 2}
    loaded = load(rewritten(tensors | head, checkpoint_dir, tmp_path / "new"), tie_embeddings=tied)
    sequence, expected = judge.prompt(TEXT)
    torch.testing.assert_close(Driver(loaded).run(sequence, 4), expected.flip(1) * 2, rtol=0, atol=2e-4)


def test_an_untied_model_needs_its_head(checkpoint_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load(checkpoint_dir, tie_embeddings=False)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.gate.weight_1",
        "model.layers.2.mlp.experts.9.down_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
    ],
)
@pytest.mark.parametrize("fault", ["missing", "misshapen"])
def test_a_tensor_that_is_not_as_expected_is_named(
    tensors: Tensors, checkpoint_dir: Path, tmp_path: Path, name: str, fault: str
) -> None:
    changed = {n: t for n, t in tensors.items() if n != name}
    if fault == "misshapen":
        changed[name] = tensors[name][1:]
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(rewritten(changed, checkpoint_dir, tmp_path / "new"))


def test_a_decoder_tensor_nobody_asks_for_is_named(tensors: Tensors, checkpoint_dir: Path, tmp_path: Path) -> None:
    extra = "model.layers.1.self_attn.q_proj.bias"
    changed = tensors | {extra: torch.zeros(128)}
    with pytest.raises(CheckpointError, match=extra.replace(".", r"\.")):
        load(rewritten(changed, checkpoint_dir, tmp_path / "new"))


def test_an_unknown_dtype_is_refused(checkpoint_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="int7"):
        load(checkpoint_dir, dtype="int7")


def test_everything_follows_the_dtype_but_the_routers(checkpoint_dir: Path) -> None:
    loaded = load(checkpoint_dir, dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    precise = {
        t.data_ptr()
        for layer in loaded.weights.layers
        if isinstance(layer.mlp, MoE)
        for t in (layer.mlp.gate, layer.mlp.bias)
    }
    for tensor in tensors_of(loaded.weights):
        assert tensor.dtype == (torch.float32 if tensor.data_ptr() in precise else torch.bfloat16)


def test_bf16_logits_are_near_those_of_float32(judge: Judge, checkpoint_dir: Path) -> None:
    sequence, expected = judge.prompt(TEXT, IMAGE, [7])
    actual = Driver(load(checkpoint_dir, dtype="bfloat16")).run(sequence, 5)
    assert actual.dtype == torch.float32
    assert float((actual - expected).norm() / expected.norm()) < 0.05


def dequantized(model: ErnieModel) -> ErnieModel:
    """The same model with the weights its quantised ones stand for."""

    def restore(part: object) -> object:
        if isinstance(part, Quantized):
            return dense(part)
        if isinstance(part, tuple):
            return tuple(restore(item) for item in part)
        if is_dataclass(part):
            return type(part)(*(restore(getattr(part, field.name)) for field in fields(part)))
        return part

    weights = restore(model.weights)
    assert isinstance(weights, Weights)
    return ErnieModel(model.config, weights, Ops())


@pytest.mark.parametrize(("quantization", "bound"), [("wint8", 0.08), ("wint4", 0.25)])
def test_quantized_model_is_its_dequantized_one(
    judge: Judge, checkpoint_dir: Path, quantization: Quantization, bound: float
) -> None:
    quantized = load(checkpoint_dir, quantization)
    pieces = (TEXT, IMAGE, [7])
    actual = Driver(quantized).run(judge.prompt(*pieces)[0], 5)
    sequence, expected = judge.prompt(*pieces)
    assert torch.equal(actual, Driver(dequantized(quantized)).run(sequence, 5))
    error = float((actual - expected).norm() / expected.norm())
    assert 0 < error < bound


@pytest.mark.parametrize(("quantization", "expert_bits"), [("wint8", 8), ("wint4", 4)])
def test_what_is_quantized(checkpoint_dir: Path, quantization: Quantization, expert_bits: int) -> None:
    weights = load(checkpoint_dir, quantization).weights
    dense_layer, *moe_layers = weights.layers

    def bits(part: SwiGLU) -> set[int | None]:
        return {w.bits if isinstance(w, Quantized) else None for w in (part.gate_up, part.down)}

    assert isinstance(dense_layer.mlp, SwiGLU)
    assert bits(dense_layer.mlp) == {8}
    for layer in moe_layers:
        assert isinstance(layer.mlp, MoE)
        assert bits(layer.mlp.shared) == {8}
        for pool in (layer.mlp.text, layer.mlp.vision):
            assert bits(SwiGLU(pool.gate_up, pool.down)) == {expert_bits}
        assert all(isinstance(w, Quantized) and w.bits == 8 for w in (layer.qkv, layer.out))
        assert layer.mlp.gate.dtype == layer.mlp.bias.dtype == torch.float32
    assert {t.dtype for t in (weights.embedding, weights.head, weights.norm)} == {torch.float32}


def test_quantized_weights_take_less_memory(checkpoint_dir: Path) -> None:
    plain, wint8 = (nbytes(load(checkpoint_dir, q, dtype="bfloat16").weights) for q in (None, "wint8"))
    weights = load(checkpoint_dir, dtype="bfloat16").weights
    wint4_weights = load(checkpoint_dir, "wint4", dtype="bfloat16").weights
    kept = weights.embedding.nbytes
    assert wint8 - kept < 0.6 * (plain - kept)
    # This model's rows are shorter than a block of 4-bit inputs, which is padded: what counts is what a full row takes.
    expert = next(layer.mlp.text.gate_up for layer in wint4_weights.layers if isinstance(layer.mlp, MoE))
    assert isinstance(expert, Quantized)
    assert expert.data.nbytes == expert.scale.numel() * -(-expert.in_features // 512) * 256


class AnyShape:
    """A checkpoint that has whatever is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def get(self, name: str, shape: Sequence[int]) -> Tensor:
        self.asked.append(name)
        return torch.ones(*shape)

    def integers(self, name: str, shape: tuple[int, int], device: torch.device) -> None:
        """Nothing is stored quantised."""

    def has(self, name: str) -> bool:
        return True

    def check_all_used(self, prefixes: Sequence[str]) -> None:
        pass


def test_every_tensor_is_read_once(model: ErnieModel) -> None:
    checkpoint = AnyShape()
    load_weights(checkpoint, model.config, torch.float32, torch.device("cpu"), None)  # type: ignore[arg-type]
    assert len(checkpoint.asked) == len(set(checkpoint.asked))


def test_weights_that_are_drawn_need_no_checkpoint_and_are_the_same_again(checkpoint_dir: Path, tmp_path: Path) -> None:
    shutil.copyfile(checkpoint_dir / "config.json", tmp_path / "config.json")
    config = load_model_config(tmp_path)
    settings = EngineSettings(redis_url="unix:///unused", model=str(tmp_path), load_format="dummy")
    first, again = (load_model(weights_of(settings, "cpu"), config, "cpu", None, Ops()) for _ in range(2))
    pairs = list(zip(tensors_of(first.weights), tensors_of(again.weights), strict=True))
    assert all(torch.equal(one, other) for one, other in pairs)
    assert bool((first.weights.norm == 1).all())
    layer = first.weights.layers[0]
    assert isinstance(layer.qkv, Tensor)
    assert float(layer.qkv.float().std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(layer.qkv[:32], layer.qkv[32:64])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        weights_of(replace(settings, load_format="auto"), "cpu")
